// The few operators that need more than the fallback: allocation, copies, views, dropout, attention.
#pragma once

#include "fallback.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_to_copy_native.h>
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

// A tensor without memory that stands for zeros; autograd makes them. Here they are ordinary zeros.
inline Tensor efficient_zero_tensor(
    at::IntArrayRef sizes,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory) {
  const HostKernels below_autograd;
  return at::zeros(sizes, dtype, layout, device, pin_memory);
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
  copy_in_host_memory(source, target);
  return target;
}

// The kernel behind `.to`. Device types that know nothing of this memory, such as `lazy`, get a copy on the
// host, because torch reads the memory of the source itself before any kernel could help.
inline Tensor to_copy(
    const Tensor& source,
    std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout,
    std::optional<at::Device> device,
    std::optional<bool> pin_memory,
    bool non_blocking,
    std::optional<at::MemoryFormat> memory_format) {
  const c10::DeviceType to = device.value_or(source.device()).type();
  if (to == kDeviceType || to == c10::kCPU || to == c10::kMeta) {
    return at::native::_to_copy(source, dtype, layout, device, pin_memory, non_blocking, memory_format);
  }
  return at::_to_copy(source.cpu(), dtype, layout, device, pin_memory, non_blocking, memory_format);
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

// Says that a stream uses the tensor. Kernels end before their calls return, so its memory is safe anyway.
inline void record_stream(Tensor&, c10::Stream) {}

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

// ------------------------------------------------------------------------------------ the host's way

// Where torch has both a kernel for the host and a generic one for devices without their own, the generic
// one may round differently or lay the result out differently. These operators take the host's kernel.
inline void prefer_host_kernels(torch::Library& aten) {
  using c10::DispatchKey;
  // `convolution` is generic for the host as well, but chooses a library by the device.
  std::vector<std::string> names = {"convolution", "convolution_backward"};
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNamesForDispatchKey(DispatchKey::CPU)) {
    const auto op = dispatcher.findOp(name);
    const auto has = [&](DispatchKey key) { return op.has_value() && op->hasKernelForDispatchKey(key); };
    const bool generic = has(DispatchKey::CompositeExplicitAutogradNonFunctional) ||
        has(DispatchKey::CompositeExplicitAutograd) || has(DispatchKey::CompositeImplicitAutograd);
    if (name.getNamespace() == "aten" && generic) {
      names.push_back(c10::toString(name));
    }
  }
  for (const std::string& name : names) {
    aten.impl(name.c_str(), torch::CppFunction::makeFromBoxedFunction<&run_on_host>());
  }
}

} // namespace emulated
