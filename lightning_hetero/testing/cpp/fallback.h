// Runs any operator of torch on an emulated device, with the host's kernel and without a copy.
//
// Device memory is host memory, so every device tensor has a host twin: a second tensor on the same
// memory. An operator call is translated (device tensors to twins), made, and translated back:
//   * a twin that comes back (in-place and out= operators) is the device tensor it stands for;
//   * a result on the memory of a twin is a view of the device tensor;
//   * any other result is new, and the device adopts its memory.
#pragma once

#include "runtime.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include <optional>
#include <string>
#include <unordered_map>

namespace emulated {

using at::Tensor;
using c10::IValue;

inline bool on_device(const Tensor& tensor) {
  return tensor.defined() && tensor.device().type() == kDeviceType;
}

// The kernels of the host run below autograd and autocast, which have done their part on the device tensors.
class HostKernels {
  c10::impl::ExcludeDispatchKeyGuard autograd_{c10::autograd_dispatch_keyset_with_ADInplaceOrView};
  c10::impl::ExcludeDispatchKeyGuard autocast_{c10::autocast_dispatch_keyset};
};

inline Tensor tensor_on(c10::Storage storage, c10::DispatchKeySet keys, const Tensor& like) {
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  tensor._set_conj(like.is_conj());
  tensor._set_neg(like.is_neg());
  return tensor;
}

// A host storage on the memory of a device storage, which it keeps alive.
inline c10::Storage host_twin(const c10::Storage& storage) {
  auto* keep_alive = new c10::Storage(storage);
  at::DataPtr memory(
      const_cast<void*>(storage.data()),
      keep_alive,
      [](void* context) { delete static_cast<c10::Storage*>(context); },
      c10::Device(c10::kCPU));
  return {
      c10::Storage::use_byte_size_t{},
      storage.nbytes(),
      std::move(memory),
      c10::GetAllocator(c10::kCPU),
      /*resizable=*/true};
}

inline Tensor host_twin(const Tensor& tensor) {
  return tensor_on(host_twin(tensor.storage()), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
}

// One call of one operator on its way to the host and back.
class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack& stack) : schema_(op.schema()), stack_(stack) {
    device_ = &device_at(find_device());
  }

  EmulatedDevice& device() {
    return *device_;
  }

  void translate_arguments() {
    const auto& arguments = schema_.arguments();
    const size_t first = stack_.size() - arguments.size();
    for (size_t i = 0; i < arguments.size(); i++) {
      IValue& value = stack_[first + i];
      if (value.isDevice() && value.toDevice().type() == kDeviceType) {
        value = c10::Device(c10::kCPU);
      } else if (arguments[i].name() == "generator") {
        value = host_generator(value);
      } else {
        map_tensors(value, [&](const Tensor& tensor) { return to_host(tensor, arguments[i]); });
      }
    }
  }

  void translate_results() {
    take_back_changes();
    const size_t count = schema_.returns().size();
    for (size_t i = stack_.size() - count; i < stack_.size(); i++) {
      map_tensors(stack_[i], [&](const Tensor& tensor) { return to_device(tensor); });
    }
  }

 private:
  struct SharedStorage {
    c10::Storage device;
    c10::Storage host;
  };
  struct Twins {
    Tensor device;
    Tensor host;
    bool written; // the operator may change it, its shape included
  };

  template <class Map>
  static void map_tensors(IValue& value, const Map& map) {
    if (value.isTensor()) {
      value = map(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> mapped;
      for (const Tensor& tensor : value.toTensorVector()) {
        mapped.push_back(map(tensor));
      }
      value = std::move(mapped);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> mapped;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        mapped.push_back(tensor ? std::optional<Tensor>(map(*tensor)) : std::nullopt);
      }
      value = std::move(mapped);
    }
  }

  // The device of the tensors; else the one that the call names; else the current one.
  c10::DeviceIndex find_device() const {
    c10::DeviceIndex of_tensors = -1;
    c10::DeviceIndex named = -1;
    for (size_t i = stack_.size() - schema_.arguments().size(); i < stack_.size() && of_tensors < 0; i++) {
      IValue value = stack_[i];
      if (value.isDevice() && value.toDevice().type() == kDeviceType) {
        named = value.toDevice().index();
      }
      map_tensors(value, [&](const Tensor& tensor) {
        of_tensors = of_tensors < 0 && on_device(tensor) ? tensor.device().index() : of_tensors;
        return tensor;
      });
    }
    return of_tensors >= 0 ? of_tensors : index_or_current(named);
  }

  Tensor to_host(const Tensor& tensor, const c10::Argument& argument) {
    if (!tensor.defined()) {
      return tensor;
    }
    const bool written = argument.alias_info() != nullptr && argument.alias_info()->isWrite();
    if (!on_device(tensor)) {
      check_may_stay_on_host(tensor, argument, written);
      return tensor;
    }
    TORCH_CHECK(tensor.device() == device_->device(), mismatch(tensor, argument));
    // An argument that is given twice is one tensor on the host too: kernels ask for that to take shortcuts.
    const auto [place, is_new] = index_of_twins_.try_emplace(tensor.unsafeGetTensorImpl(), twins_.size());
    if (is_new) {
      c10::Storage host_storage = shared_host_storage(tensor.storage());
      Tensor host = tensor_on(std::move(host_storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor);
      twins_.push_back({tensor, std::move(host), written});
    }
    Twins& twins = twins_[place->second];
    twins.written |= written;
    return twins.host;
  }

  // The rules of CUDA: numbers may be read from the host, and so may index tensors.
  void check_may_stay_on_host(const Tensor& tensor, const c10::Argument& argument, bool written) const {
    const bool number = tensor.device().is_cpu() && tensor.dim() == 0 && !written;
    const bool index = tensor.device().is_cpu() && argument.name() == "indices" &&
        argument.type()->kind() == c10::TypeKind::ListType;
    TORCH_CHECK(number || index, mismatch(tensor, argument));
  }

  std::string mismatch(const Tensor& tensor, const c10::Argument& argument) const {
    return c10::str(
        "Expected all tensors to be on the same device, but found at least two devices, ",
        device_->device(),
        " and ",
        tensor.device(),
        "! (when checking argument for argument ",
        argument.name(),
        " in method ",
        schema_.name(),
        ")");
  }

  // Tensors that share memory on the device share it on the host, so that overlaps are noticed there.
  c10::Storage shared_host_storage(const c10::Storage& storage) {
    c10::StorageImpl* key = storage.unsafeGetStorageImpl();
    const auto [place, is_new] = index_of_storage_.try_emplace(key, storages_.size());
    if (is_new) {
      storages_.push_back({storage, host_twin(storage)});
      index_of_storage_.emplace(storages_.back().host.unsafeGetStorageImpl(), place->second);
    }
    return storages_[place->second].host;
  }

  IValue host_generator(const IValue& value) const {
    if (value.isNone()) {
      return device_->host_generator;
    }
    const at::Generator generator = value.toGenerator();
    TORCH_CHECK(
        generator.device() == device_->device(),
        "Expected a generator of ",
        device_->device(),
        " but found one of ",
        generator.device(),
        ". Make it with torch.Generator(device=\"",
        device_->device(),
        "\").");
    return generator.get<Generator>()->host();
  }

  // The kernel may have given an argument a new shape, or more memory (out= tensors that were too small).
  void take_back_changes() {
    for (auto& [device, host] : storages_) {
      if (host.data() != device.data()) {
        at::DataPtr memory = adopt(*device_, host);
        device.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
        device.unsafeGetStorageImpl()->set_nbytes(host.nbytes());
      }
    }
    for (auto& [device, host, written] : twins_) {
      if (written && (device.sizes() != host.sizes() || device.strides() != host.strides())) {
        c10::TensorImpl* changed = device.unsafeGetTensorImpl();
        changed->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
      }
    }
  }

  Tensor to_device(const Tensor& result) {
    if (!result.defined()) {
      return result;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(
        result.layout() == c10::kStrided,
        "Could not run '",
        schema_.name(),
        "' on ",
        device_->device(),
        ": its result is ",
        result.layout(),
        ", and emulated devices have dense tensors only");
    for (const Twins& twins : twins_) {
      if (twins.host.is_same(result)) {
        return twins.device;
      }
    }
    device_->check_dtype(result.scalar_type());
    return tensor_on(device_storage(result.storage()), kKeySet, result);
  }

  // The device storage whose twin this is, or a new one with its memory.
  c10::Storage device_storage(const c10::Storage& host) {
    c10::StorageImpl* key = host.unsafeGetStorageImpl();
    const auto [place, is_new] = index_of_storage_.try_emplace(key, storages_.size());
    if (is_new) {
      c10::Storage device(
          c10::Storage::use_byte_size_t{}, host.nbytes(), adopt(*device_, host), device_allocator(), true);
      storages_.push_back({device, host});
    }
    return storages_[place->second].device;
  }

  const c10::FunctionSchema& schema_;
  torch::jit::Stack& stack_;
  EmulatedDevice* device_;
  std::vector<Twins> twins_;
  std::unordered_map<c10::TensorImpl*, size_t> index_of_twins_;
  std::vector<SharedStorage> storages_;
  std::unordered_map<c10::StorageImpl*, size_t> index_of_storage_; // of device and host storages alike
};

inline void run_on_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  HostCall call(op, *stack);
  call.translate_arguments();
  const auto start = Clock::now();
  {
    HostKernels below_autograd;
    op.callBoxed(stack);
  }
  call.device().finish_kernel(seconds_since(start));
  call.translate_results();
}

} // namespace emulated
