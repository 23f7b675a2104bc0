// The state of one emulated device: its limits, its counters and what it costs to use it.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/Generator.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace emulated {

constexpr auto kDeviceType = c10::DeviceType::PrivateUse1;
constexpr auto kKeySet = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1);

using Clock = std::chrono::steady_clock;

inline double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

inline void sleep_seconds(double duration) {
  if (duration > 0) {
    std::this_thread::sleep_for(std::chrono::duration<double>(duration));
  }
}

// What a test may make worse than the host's processor is.
struct Limits {
  int64_t cap_bytes = -1; // -1: as much as the host has
  double slowdown = 1.0; // a kernel takes this many times what it takes on the host
  double launch_s = 0.0; // added to every kernel
  double bandwidth_bytes_per_s = 0.0; // 0: as fast as the host copies
  double latency_s = 0.0; // added to every transfer
  uint64_t missing_dtypes = 0; // one bit for each scalar type that the device does not have
};

struct Counters {
  int64_t used_bytes = 0; // alive now
  int64_t peak_bytes = 0; // most that was alive at once since the last reset
  int64_t allocations = 0;
  int64_t allocated_bytes = 0; // sum over all allocations
  int64_t ooms = 0;
  int64_t h2d_bytes = 0; // received from the host
  int64_t d2h_bytes = 0; // sent to the host
  int64_t d2d_bytes = 0; // sent to another emulated device
  int64_t ops = 0; // kernels that ran; views and allocations are none
  double waited_s = 0; // sum of all waits
};

enum class Route { host_to_device, device_to_host, device_to_device };

inline int64_t host_memory_bytes() {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGE_SIZE);
}

class EmulatedDevice {
 public:
  explicit EmulatedDevice(c10::DeviceIndex index) : device_(kDeviceType, index) {}

  c10::Device device() const {
    return device_;
  }

  // Takes `bytes` from the device's memory. Raises torch.OutOfMemoryError when they are not there.
  void charge(int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    if (limits_.cap_bytes >= 0 && counters_.used_bytes + bytes > limits_.cap_bytes) {
      counters_.ooms++;
      TORCH_CHECK_WITH(
          OutOfMemoryError,
          false,
          device_,
          " is out of memory. Tried to allocate ",
          bytes,
          " bytes, but ",
          counters_.used_bytes,
          " of its ",
          limits_.cap_bytes,
          " bytes are in use.");
    }
    counters_.used_bytes += bytes;
    counters_.peak_bytes = std::max(counters_.peak_bytes, counters_.used_bytes);
    counters_.allocated_bytes += bytes;
    counters_.allocations += bytes > 0;
  }

  void discharge(int64_t bytes) noexcept {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_.used_bytes -= bytes;
  }

  // Accounts for a kernel that took `host_s` on the host, and waits for as long as the device is slower.
  void finish_kernel(double host_s) {
    double wait_s = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      counters_.ops++;
      wait_s = host_s * (limits_.slowdown - 1) + limits_.launch_s;
      counters_.waited_s += wait_s;
    }
    sleep_seconds(wait_s);
  }

  void count_transfer(Route route, int64_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    switch (route) {
      case Route::host_to_device:
        counters_.h2d_bytes += bytes;
        break;
      case Route::device_to_host:
        counters_.d2h_bytes += bytes;
        break;
      case Route::device_to_device:
        counters_.d2d_bytes += bytes;
        break;
    }
  }

  // Waits for as long as the device's link needs for `bytes`.
  void occupy_link(int64_t bytes) {
    double wait_s = 0;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const double rate = limits_.bandwidth_bytes_per_s;
      wait_s = limits_.latency_s + (rate > 0 ? static_cast<double>(bytes) / rate : 0.0);
      counters_.waited_s += wait_s;
    }
    sleep_seconds(wait_s);
  }

  void check_dtype(c10::ScalarType dtype) {
    TORCH_CHECK_TYPE(
        !((limits().missing_dtypes >> static_cast<int>(dtype)) & 1),
        device_,
        " does not support torch.",
        c10::getDtypeNames(dtype).first,
        ". Use another dtype, or place this tensor on another device.");
  }

  Limits limits() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return limits_;
  }

  void set_limits(const Limits& limits) {
    std::lock_guard<std::mutex> lock(mutex_);
    limits_ = limits;
  }

  Counters counters() const {
    std::lock_guard<std::mutex> lock(mutex_);
    return counters_;
  }

  // Sets the counters to zero. Memory that is in use stays in use, and the peak starts from there.
  void reset_counters() {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t used_bytes = counters_.used_bytes;
    counters_ = Counters{};
    counters_.used_bytes = counters_.peak_bytes = used_bytes;
  }

  void reset_peak() {
    std::lock_guard<std::mutex> lock(mutex_);
    counters_.peak_bytes = counters_.used_bytes;
  }

  int64_t total_bytes() const {
    const int64_t cap_bytes = limits().cap_bytes;
    return cap_bytes >= 0 ? cap_bytes : host_memory_bytes();
  }

  // Random numbers come from a host generator, so that equal seeds give the numbers of the host.
  const at::Generator host_generator = at::detail::createCPUGenerator();
  at::Generator generator; // what torch sees; made by initialize()

 private:
  const c10::Device device_;
  mutable std::mutex mutex_; // guards the two below
  Limits limits_;
  Counters counters_;
};

// All devices. Filled once, before torch can name one, and never freed: tensors may outlive main().
inline std::vector<std::unique_ptr<EmulatedDevice>>& all_devices() {
  static auto* devices = new std::vector<std::unique_ptr<EmulatedDevice>>();
  return *devices;
}

inline c10::DeviceIndex device_count() {
  return static_cast<c10::DeviceIndex>(all_devices().size());
}

inline EmulatedDevice& device_at(c10::DeviceIndex index) {
  TORCH_CHECK(
      index >= 0 && index < device_count(),
      "invalid device ordinal ",
      static_cast<int>(index),
      ": there are ",
      static_cast<int>(device_count()),
      " emulated devices");
  return *all_devices()[index];
}

// Which device is current is a matter of each thread, as with CUDA.
inline c10::DeviceIndex& current_index() {
  thread_local c10::DeviceIndex index = 0;
  return index;
}

inline c10::DeviceIndex index_or_current(c10::DeviceIndex index) {
  return index >= 0 ? index : current_index();
}

} // namespace emulated
