// An emulated accelerator on torch's PrivateUse1 key: several devices in host memory, with the numbers of
// the host, an autograd thread each, and limits that a test can set. Read the headers in this order.
#include "device.h" // limits, counters, costs
#include "memory.h" // allocators
#include "runtime.h" // guard, streams, generators, hooks
#include "autograd.h" // threads
#include "fallback.h" // any operator, on the host's kernel
#include "kernels.h" // the operators that need more

#include <ATen/autocast_mode.h>
#include <torch/csrc/utils/pybind.h>

namespace {

using emulated::Counters;
using emulated::Limits;

// -------------------------------------------------------------------------- registration with torch

REGISTER_ALLOCATOR(emulated::kDeviceType, emulated::device_allocator());
C10_REGISTER_GUARD_IMPL(PrivateUse1, emulated::Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&emulated::run_on_host>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", emulated::empty);
  m.impl("empty_strided", emulated::empty_strided);
  m.impl("_efficientzerotensor", emulated::efficient_zero_tensor);
  m.impl("_to_copy", emulated::to_copy);
  m.impl("_copy_from", emulated::copy_from);
  m.impl("_copy_from_and_resize", emulated::copy_from_and_resize);
  m.impl("_local_scalar_dense", emulated::local_scalar_dense);
  m.impl("native_dropout", emulated::native_dropout);
  m.impl("record_stream", emulated::record_stream);

  for (const char* name :
       {"view",
        "as_strided",
        "_reshape_alias",
        "unfold",
        "view_as_real",
        "view_as_complex",
        "resize_",
        "set_.source_Storage",
        "set_.source_Storage_storage_offset",
        "set_.source_Tensor",
        "set_"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&emulated::run_shape_kernel>());
  }

  emulated::prefer_host_kernels(m);
}

// A copy of a lazily conjugated or negated tensor is what makes it an ordinary one, so the copy must see it
// as it is. Without this, torch would ask for a copy before the copy, for ever.
TORCH_LIBRARY_IMPL(aten, Conjugate, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(aten, Negative, m) {
  m.impl("_copy_from", torch::CppFunction::makeFallthrough());
}

} // namespace

namespace at::native {
REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &emulated::choose_attention)
} // namespace at::native

namespace {

// ---------------------------------------------------------------------------------- autocast: CUDA's lists

using at::IntArrayRef; // torch's lists name these without at::
using at::Scalar;
using at::ScalarType;
using at::Tensor;
#if __has_include(<ATen/core/Dimname.h>) // torch that has named tensors
using at::DimnameList;
#endif

Tensor refuse_binary_cross_entropy(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t) {
  TORCH_CHECK(
      false,
      "torch.nn.functional.binary_cross_entropy and torch.nn.BCELoss are unsafe to autocast. "
      "Use binary_cross_entropy_with_logits or torch.nn.BCEWithLogitsLoss, which are safe.");
}

#define LOWER_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, lower_precision_fp)
#define FULL_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32)
#define FULL_PRECISION_OUTPUT(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, fp32_set_opt_dtype)
#define WIDEST_PRECISION(...) KERNEL_PRIVATEUSEONE(__VA_ARGS__, promote)

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  AT_FORALL_LOWER_PRECISION_FP(LOWER_PRECISION)
  AT_FORALL_FP32(FULL_PRECISION)
  AT_FORALL_FP32_SET_OPT_DTYPE(FULL_PRECISION_OUTPUT)
  AT_FORALL_DIFFERENT_REDISPATCH_SIGNATURE(KERNEL_DIFFERENT_REDISPATCH_SIGNATURE_PRIVATEUSEONE)
  AT_FORALL_PROMOTE(WIDEST_PRECISION)
  m.impl("binary_cross_entropy", TORCH_FN(refuse_binary_cross_entropy));
}

// ------------------------------------------------------------------------------------ face to Python

// Makes the devices and registers them with torch. To be called once.
void initialize(int count) {
  TORCH_CHECK(emulated::device_count() == 0, "the emulated devices exist already");
  TORCH_CHECK(count >= 1 && count <= 64, "the number of emulated devices must be 1 to 64, got ", count);
  for (int index = 0; index < count; index++) {
    auto device = std::make_unique<emulated::EmulatedDevice>(static_cast<c10::DeviceIndex>(index));
    device->generator = at::make_generator<emulated::Generator>(device->device().index(), device->host_generator);
    emulated::all_devices().push_back(std::move(device));
  }
  at::RegisterPrivateUse1HooksInterface(new emulated::Hooks());
  emulated::AutogradThreads::start_if_late();
}

emulated::EmulatedDevice& device_of(int index) {
  return emulated::device_at(static_cast<c10::DeviceIndex>(index));
}

void configure(
    int index,
    int64_t cap_bytes,
    double slowdown,
    double launch_s,
    double bandwidth_bytes_per_s,
    double latency_s,
    const std::vector<at::ScalarType>& missing_dtypes) {
  Limits limits{cap_bytes, slowdown, launch_s, bandwidth_bytes_per_s, latency_s, 0};
  for (const at::ScalarType dtype : missing_dtypes) {
    limits.missing_dtypes |= uint64_t{1} << static_cast<int>(dtype);
  }
  device_of(index).set_limits(limits);
}

py::dict stats(int index) {
  const Counters counters = device_of(index).counters();
  py::dict result;
  result["used_bytes"] = counters.used_bytes;
  result["peak_bytes"] = counters.peak_bytes;
  result["h2d_bytes"] = counters.h2d_bytes;
  result["d2h_bytes"] = counters.d2h_bytes;
  result["d2d_bytes"] = counters.d2d_bytes;
  result["ops"] = counters.ops;
  result["ooms"] = counters.ooms;
  result["allocations"] = counters.allocations;
  result["waited_s"] = counters.waited_s;
  return result;
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "An emulated accelerator; see lightning_hetero.testing.";
  m.def("initialize", &initialize, py::arg("count"));
  m.def("device_count", [] { return static_cast<int>(emulated::device_count()); });
  m.def("current_device", [] { return static_cast<int>(emulated::current_index()); });
  m.def("set_device", [](int index) {
    emulated::current_index() = device_of(index).device().index();
  });
  m.def("configure", &configure);
  m.def("stats", &stats);
  m.def("reset_counters", [](int index) { device_of(index).reset_counters(); });
  m.def("reset_peak", [](int index) { device_of(index).reset_peak(); });
  m.def("total_bytes", [](int index) { return device_of(index).total_bytes(); });
  m.def("generator", [](int index) { return device_of(index).generator; });
  m.def("let_go_of_graphs", &emulated::AutogradThreads::let_go_of_graphs, py::call_guard<py::gil_scoped_release>());
}
