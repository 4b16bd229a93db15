// A CUDA device for torch to talk about, not to compute on: what the C++ side of torch asks for while fake
// tensors (shapes without data) are traced and differentiated. Loaded before torch, by bench/hopper.py alone.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>

namespace {

// Of several ranks each has the device of its number, as under torchrun.
c10::DeviceIndex number(const char* name, int otherwise) {
  const char* text = std::getenv(name);
  return static_cast<c10::DeviceIndex>(text ? std::atoi(text) : otherwise);
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  static c10::Device device() { return {c10::DeviceType::CUDA, number("LOCAL_RANK", 0)}; }
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Device getDevice() const override { return device(); }
  c10::DeviceIndex deviceCount() const noexcept override { return number("LOCAL_WORLD_SIZE", 1); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return false; }
  c10::DeviceIndex deviceCount() const override { return number("LOCAL_WORLD_SIZE", 1); }
  c10::DeviceIndex getCurrentDevice() const override { return number("LOCAL_RANK", 0); }
  c10::DeviceIndex current_device() const override { return number("LOCAL_RANK", 0); }
  int getNumGPUs() const override { return number("LOCAL_WORLD_SIZE", 1); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(c10::DeviceType::CPU); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

}  // namespace

namespace at {
// Preferred to the hooks that a CUDA build registers under this name.
C10_REGISTER_TYPED_CLASS_WITH_PRIORITY(CUDAHooksRegistry, "CUDAHooks", c10::REGISTRY_PREFERRED, Hooks)
}  // namespace at

// Called once torch is there: the last guard registered counts.
extern "C" void register_guard() {
  static Guard guard;
  static c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA, &guard);
}
