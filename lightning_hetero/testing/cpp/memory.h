// Device memory: host memory that is charged to an emulated device for as long as its storage lives.
#pragma once

#include "device.h"

#include <c10/core/Allocator.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/Storage.h>

#include <cstring>
#include <unordered_set>
#include <utility>

namespace emulated {

// Owner of one piece of device memory. Exactly one of the last two members holds it.
struct Block {
  EmulatedDevice& device;
  int64_t bytes;
  at::DataPtr allocated; // by the device's allocator
  c10::Storage adopted; // made by a kernel of the host
};

inline void free_block(void* context) {
  auto* block = static_cast<Block*>(context);
  block->device.discharge(block->bytes);
  delete block;
}

inline at::DataPtr allocate_on(EmulatedDevice& device, size_t size_bytes) {
  const auto bytes = static_cast<int64_t>(size_bytes);
  device.charge(bytes);
  auto* block = new Block{device, bytes, {}, {}};
  at::DataPtr owner(nullptr, block, &free_block, device.device()); // gives it back if the host has no memory
  block->allocated = c10::GetAllocator(c10::kCPU)->allocate(size_bytes);
  return {block->allocated.get(), owner.release_context(), &free_block, device.device()};
}

// Makes the memory of a host storage the device's, without a copy.
inline at::DataPtr adopt(EmulatedDevice& device, const c10::Storage& storage) {
  const auto bytes = static_cast<int64_t>(storage.nbytes());
  device.charge(bytes);
  auto* block = new Block{device, bytes, {}, storage};
  return {const_cast<void*>(storage.data()), block, &free_block, device.device()};
}

// What `torch.empty(..., device=...)` and `torch.accelerator.memory_*` talk to.
class Allocator final : public c10::DeviceAllocator {
 public:
  at::DataPtr allocate(size_t size_bytes) override {
    return allocate_on(device_at(current_index()), size_bytes);
  }
  at::DeleterFnPtr raw_deleter() const override {
    return nullptr; // a block is more than its pointer
  }
  void copy_data(void* target, const void* source, size_t size_bytes) const override {
    std::memcpy(target, source, size_bytes);
  }
  bool initialized() override {
    return device_count() > 0;
  }
  void emptyCache(c10::MempoolId_t) override {} // nothing is cached
  void recordStream(const at::DataPtr&, c10::Stream) override {} // kernels end before they return

  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(c10::DeviceIndex index) override {
    const Counters counters = device_at(index).counters();
    c10::CachingDeviceAllocator::DeviceStats stats;
    for (auto* bytes :
         {&stats.allocated_bytes, &stats.reserved_bytes, &stats.active_bytes, &stats.requested_bytes}) {
      auto& sum = (*bytes)[static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE)];
      sum.current = counters.used_bytes;
      sum.peak = counters.peak_bytes;
      sum.allocated = counters.allocated_bytes;
      sum.freed = counters.allocated_bytes - counters.used_bytes;
    }
    stats.num_ooms = counters.ooms;
    stats.num_device_alloc = counters.allocations;
    return stats;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {} // only EmulatedAccelerator.reset does
  void resetPeakStats(c10::DeviceIndex index) override {
    device_at(index).reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex index) override {
    const int64_t total_bytes = device_at(index).total_bytes();
    const int64_t free_bytes = std::max<int64_t>(0, total_bytes - device_at(index).counters().used_bytes);
    return {static_cast<size_t>(free_bytes), static_cast<size_t>(total_bytes)};
  }
};

inline Allocator* device_allocator() {
  static auto* allocator = new Allocator();
  return allocator;
}

// Host memory that `tensor.pin_memory()` returns. There is nothing to pin: it only remembers its pointers.
class PinnedAllocator final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t size_bytes) override {
    auto* memory = new at::DataPtr(c10::GetAllocator(c10::kCPU)->allocate(size_bytes));
    remember(memory->get());
    return {memory->get(), memory, &forget_and_free, c10::Device(c10::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }
  void copy_data(void* target, const void* source, size_t size_bytes) const override {
    std::memcpy(target, source, size_bytes);
  }
  bool owns(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    return pinned_.count(pointer) > 0;
  }

 private:
  static void forget_and_free(void* context);
  void remember(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    pinned_.insert(pointer);
  }
  void forget(const void* pointer) {
    std::lock_guard<std::mutex> lock(mutex_);
    pinned_.erase(pointer);
  }

  std::mutex mutex_;
  std::unordered_set<const void*> pinned_;
};

inline PinnedAllocator* pinned_allocator() {
  static auto* allocator = new PinnedAllocator();
  return allocator;
}

inline void PinnedAllocator::forget_and_free(void* context) {
  auto* memory = static_cast<at::DataPtr*>(context);
  pinned_allocator()->forget(memory->get());
  delete memory;
}

} // namespace emulated
