// The threads on which torch passes backward, one for each device.
#pragma once

#include "runtime.h"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/engine.h>

#include <thread>

namespace emulated {

class AutogradThreads : public torch::autograd::Engine {
 public:
  // Autograd starts its threads at the first backward pass of the process. When that has happened before
  // the devices came, they are started here.
  static void start_if_late() {
    const size_t threads = count();
    if (!started() || threads >= static_cast<size_t>(device_count())) {
      return;
    }
    TORCH_CHECK(
        threads == 0,
        "autograd has already started its ",
        threads,
        " device threads, too few for ",
        static_cast<int>(device_count()),
        " emulated devices. Install the emulated accelerator before the first backward pass.");
    auto& engine = torch::autograd::Engine::get_default_engine();
    (engine.*(&AutogradThreads::start_device_threads))();
  }

  // Waits until the threads have destroyed the graphs of all backward passes. A thread does so after the
  // pass, takes Python's lock for it, and is torn apart if Python shuts down meanwhile, which ends the process
  // with std::terminate. The passes made here are those of a C++ thread, so their graphs hold nothing of Python.
  static void let_go_of_graphs() {
    if (!started()) {
      return;
    }
    std::thread([] {
      try {
        for (const auto& device : all_devices()) {
          device->set_limits({});
          at::ones({}, device->device()).requires_grad_().clone().backward();
        }
      } catch (const std::exception&) { // the program is over, and nobody is left to be told
      }
    }).join();
  }

 private:
  static bool started() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    return (engine.*(&AutogradThreads::thread_pool_shared_)) != nullptr;
  }
  static size_t count() {
    auto& engine = torch::autograd::Engine::get_default_engine();
    return (engine.*(&AutogradThreads::device_ready_queues_)).size();
  }
};

} // namespace emulated
