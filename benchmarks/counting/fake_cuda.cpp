// Lets a PyTorch built without CUDA run autograd and autocast on fake tensors whose device is "cuda". Such tensors have
// no memory and start no kernels; what PyTorch still asks of the device is whether it exists, which one is current and
// which convolutions its cuDNN has.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace at {

// PyTorch finds its hooks by the name of this class.
struct CUDAHooks final : CUDAHooksInterface {
  explicit CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }

  // As of cuDNN 9: it decides which memory format the result of a convolution has.
  bool hasCuDNN() const override { return true; }
  bool compiledWithCuDNN() const override { return true; }
  bool supportsDilatedConvolutionWithCuDNN() const override { return true; }
  bool supportsDepthwiseConvolutionWithCuDNN() const override { return true; }
  bool supportsBFloat16ConvolutionWithCuDNNv8() const override { return true; }
  long versionCuDNN() const override { return 91000; }
  long versionRuntimeCuDNN() const override { return 91000; }
};

REGISTER_CUDA_HOOKS(CUDAHooks);

}  // namespace at

namespace c10::impl {

using FakeCUDAGuard = FakeGuardImpl<DeviceType::CUDA>;
C10_REGISTER_GUARD_IMPL(CUDA, FakeCUDAGuard);

}  // namespace c10::impl
