// The few operators that need more than the fallback: allocation, copies, views, dropout, attention.
#pragma once

#include "fallback.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/DeviceGuard.h>

#include <tuple>

namespace emulated {

// ---------------------------------------------------------------------------------------- allocation

inline Tensor empty(
    at::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>,
    std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  const at::ScalarType scalar_type = c10::dtype_or_default(dtype);
  device_at(current_index()).check_dtype(scalar_type);
  return at::detail::empty_generic(sizes, device_allocator(), kKeySet, scalar_type, memory_format);
}

inline Tensor empty_strided(
    at::IntArrayRef sizes,
    at::IntArrayRef strides,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout>,
    std::optional<at::Device> device,
    std::optional<bool>) {
  const c10::DeviceGuard guard(c10::device_or_default(device));
  const at::ScalarType scalar_type = c10::dtype_or_default(dtype);
  device_at(current_index()).check_dtype(scalar_type);
  return at::detail::empty_strided_generic(sizes, strides, device_allocator(), kKeySet, scalar_type);
}

// -------------------------------------------------------------------------------------------- copies

// Accounts for `source` crossing a border. What is counted is what the source holds, before a change of
// dtype and before broadcasting. A copy between two devices occupies the links of both, one after the other.
inline void cross_link(const Tensor& source, const Tensor& target) {
  const auto bytes = static_cast<int64_t>(source.nbytes());
  if (on_device(source)) {
    EmulatedDevice& sender = device_at(source.device().index());
    sender.count_transfer(on_device(target) ? Route::device_to_device : Route::device_to_host, bytes);
    sender.occupy_link(bytes);
  }
  if (on_device(target)) {
    EmulatedDevice& receiver = device_at(target.device().index());
    if (!on_device(source)) {
      receiver.count_transfer(Route::host_to_device, bytes);
    }
    receiver.occupy_link(bytes);
  }
}

inline void copy_in_host_memory(const Tensor& source, const Tensor& target) {
  const HostKernels below_autograd;
  const Tensor host_source = on_device(source) ? host_twin(source) : source;
  (on_device(target) ? host_twin(target) : target).copy_(host_source);
}

// The kernel behind `copy_`, and so behind `.to`, `.cpu()` and `.clone()`.
inline Tensor copy_from(const Tensor& source, const Tensor& target, bool /*non_blocking*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(!source.is_meta(), "Cannot copy out of meta tensor; no data!");
  if (source.device() == target.device()) {
    const auto start = Clock::now();
    copy_in_host_memory(source, target);
    device_at(source.device().index()).finish_kernel(seconds_since(start));
    return target;
  }
  cross_link(source, target);
  // A third kind of device knows nothing of this memory: it gets, and gives, a copy on the host.
  if (!on_device(source) && !source.is_cpu()) {
    copy_in_host_memory(source.cpu(), target);
  } else if (!on_device(target) && !target.is_cpu()) {
    Tensor staged = at::empty_like(source, source.options().device(at::kCPU));
    copy_in_host_memory(source, staged);
    target.copy_(staged);
  } else {
    copy_in_host_memory(source, target);
  }
  return target;
}

inline Tensor copy_from_and_resize(const Tensor& source, const Tensor& target) {
  target.resize_(source.sizes());
  return copy_from(source, target, /*non_blocking=*/false);
}

// The kernel behind `.item()`: one number travels to the host.
inline at::Scalar local_scalar_dense(const Tensor& self) {
  EmulatedDevice& device = device_at(self.device().index());
  const auto bytes = static_cast<int64_t>(self.element_size());
  device.count_transfer(Route::device_to_host, bytes);
  device.occupy_link(bytes);
  const HostKernels below_autograd;
  return host_twin(self).item();
}

// --------------------------------------------------------------------------------------------- views

// Kernels of the host that touch sizes, strides and storage only, and so are right for any device. They
// may ask the tensor's allocator for more memory, which then belongs to the current device.
inline void run_shape_kernel(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const Tensor& self = (*stack)[stack->size() - op.schema().arguments().size()].toTensor();
  const c10::DeviceGuard guard(self.device());
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
}

// ------------------------------------------------------------------------------- dropout, attention

// The host's kernel draws from the host's default generator; here the device's is drawn from.
inline std::tuple<Tensor, Tensor> native_dropout(const Tensor& input, double p, std::optional<bool> train) {
  const HostKernels below_autograd;
  if (train.has_value() && !*train) {
    return {input.clone(), at::ones_like(input, input.options().dtype(at::kBool))};
  }
  const double keep = 1.0 - p;
  Tensor mask = at::empty_like(input, input.options().dtype(at::kBool)).bernoulli_(keep);
  return {input.mul(mask).mul_(keep == 0 ? 0.0 : 1.0 / keep), mask};
}

// Lets `scaled_dot_product_attention` choose the algorithm that it would choose on the host.
inline int64_t choose_attention(
    const Tensor& query,
    const Tensor& key,
    const Tensor& value,
    const std::optional<Tensor>& attn_mask,
    double dropout_p,
    bool is_causal,
    std::optional<double> scale,
    bool enable_gqa) {
  const auto twin_of = [](const Tensor& tensor) {
    return on_device(tensor) ? host_twin(tensor).set_requires_grad(tensor.requires_grad()) : tensor;
  };
  std::optional<Tensor> mask;
  if (attn_mask.has_value() && attn_mask->defined()) {
    mask = twin_of(*attn_mask);
  }
  return at::_fused_sdp_choice(
      twin_of(query), twin_of(key), twin_of(value), mask, dropout_p, is_causal, scale, enable_gqa);
}

} // namespace emulated
