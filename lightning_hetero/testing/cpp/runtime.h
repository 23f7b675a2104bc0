// What torch asks of any accelerator: device guard, streams, events, random generators and hooks.
#pragma once

#include "memory.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

namespace emulated {

// Switches devices. Streams and events exist, but every kernel ends before its call returns.
class Guard final : public c10::impl::DeviceGuardImplInterface {
 public:
  static constexpr auto static_type = kDeviceType;

  Guard() = default;
  explicit Guard(c10::DeviceType) {}

  c10::DeviceType type() const override {
    return kDeviceType;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return device_count(); // also the number of threads that autograd starts
  }
  c10::Device getDevice() const override {
    return {kDeviceType, current_index()};
  }
  void setDevice(c10::Device device) const override {
    device_at(device.index());
    current_index() = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    current_index() = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    setDevice(device);
    return before;
  }

  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, {kDeviceType, index_or_current(device.index())});
  }
  c10::Stream getStream(c10::Device device) const override {
    const c10::DeviceIndex index = index_or_current(device.index());
    return c10::Stream(c10::Stream::UNSAFE, {kDeviceType, index}, current_stream(index));
  }
  c10::Stream getNewStream(c10::Device device, int) const override {
    static std::atomic<c10::StreamId> last_id{0};
    return c10::Stream(c10::Stream::UNSAFE, {kDeviceType, index_or_current(device.index())}, ++last_id);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    return getNewStream(device, 0);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before = getStream(stream.device());
    current_stream(stream.device_index()) = stream.id();
    return before;
  }
  bool queryStream(const c10::Stream&) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeDevice(const c10::DeviceIndex index) const override {
    device_at(index);
  }

  // An event is the time at which it was recorded.
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new Clock::time_point();
    }
    *static_cast<Clock::time_point*>(*event) = Clock::now();
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override {
    return true;
  }
  void synchronizeEvent(void*) const override {}
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Clock::time_point*>(event);
  }
  double elapsedTime(void* first, void* second, const c10::DeviceIndex) const override {
    const auto span = *static_cast<Clock::time_point*>(second) - *static_cast<Clock::time_point*>(first);
    return std::chrono::duration<double, std::milli>(span).count();
  }

  c10::DeviceCapability getDeviceCapability(c10::Device device) const override {
    const Limits limits = device_at(index_or_current(device.index())).limits();
    c10::DeviceCapability capability;
    capability.capability_data.capability_bits &= ~limits.missing_dtypes;
    return capability; // torch asks once and remembers the answer
  }

 private:
  static c10::StreamId& current_stream(c10::DeviceIndex index) {
    thread_local std::vector<c10::StreamId> streams(device_count(), 0);
    return streams.at(index);
  }
};

// A torch.Generator of an emulated device, which hands everything on to one of the host.
class Generator final : public c10::GeneratorImpl {
 public:
  Generator(c10::DeviceIndex index, at::Generator host)
      : GeneratorImpl({kDeviceType, index}, kKeySet), host_(std::move(host)) {}

  const at::Generator& host() const {
    return host_;
  }
  void set_current_seed(uint64_t seed) override {
    std::lock_guard<std::mutex> lock(host_.mutex()); // kernels draw under the lock of the host's generator
    host_.set_current_seed(seed);
  }
  uint64_t current_seed() const override {
    return host_.current_seed();
  }
  uint64_t seed() override {
    std::lock_guard<std::mutex> lock(host_.mutex());
    return host_.seed();
  }
  void set_offset(uint64_t offset) override {
    host_.set_offset(offset);
  }
  uint64_t get_offset() const override {
    return host_.get_offset();
  }
  void set_state(const c10::TensorImpl& state) override {
    std::lock_guard<std::mutex> lock(host_.mutex());
    host_.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }

 private:
  GeneratorImpl* clone_impl() const override {
    return new Generator(device().index(), host_.clone());
  }

  at::Generator host_;
};

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return device_count() > 0;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return device_count();
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return current_index();
  }
  void setCurrentDevice(c10::DeviceIndex index) const override {
    device_at(index);
    current_index() = index;
  }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    const c10::DeviceIndex before = current_index();
    setCurrentDevice(index);
    return before;
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override {
    return index >= 0 ? exchangeDevice(index) : current_index();
  }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override {
    return device_at(index_or_current(index)).generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    index = index_or_current(index);
    device_at(index);
    return at::make_generator<Generator>(index, at::detail::createCPUGenerator());
  }
  at::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  bool isPinnedPtr(const void* pointer) const override {
    return pinned_allocator()->owns(pointer);
  }
  at::Device getDeviceFromPtr(void*) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "an emulated device cannot be told from a pointer");
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t size_bytes) const override {
    at::DataPtr memory = allocate_on(device_at(storage.device().index()), size_bytes);
    if (storage.data() != nullptr && memory.get() != nullptr) {
      std::memcpy(memory.get(), storage.data(), std::min(size_bytes, storage.nbytes()));
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(memory));
    storage.unsafeGetStorageImpl()->set_nbytes(size_bytes);
  }
};

} // namespace emulated
