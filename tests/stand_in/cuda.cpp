// A CUDA device whose memory is the host's and whose kernels are the CPU's, for a build of torch without CUDA.
//
// Every operation on its tensors is taken by `on_host`: it gives the operation the same memory as CPU tensors, and gives
// back what comes of it as tensors of the device. Tensors on the device and the host are refused where CUDA refuses them.
// It must be loaded before torch is imported, which asks once for what CUDA there is.

#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::Stream;

constexpr c10::DeviceIndex DEVICES = 8;

thread_local c10::DeviceIndex current = 0;

Device device() {
  return Device(c10::kCUDA, current);
}

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  static Stream only() { return Stream(Stream::DEFAULT, device()); }
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device getDevice() const override { return device(); }
  void setDevice(Device chosen) const override { current = chosen.index(); }
  void uncheckedSetDevice(Device chosen) const noexcept override { current = chosen.index(); }
  Device exchangeDevice(Device chosen) const override {
    return Device(c10::kCUDA, std::exchange(current, chosen.index()));
  }
  c10::DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  Stream getStream(Device) const noexcept override { return only(); }
  Stream getDefaultStream(Device) const override { return only(); }
  Stream getNewStream(Device, int) const override { return only(); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return only(); }
  Stream exchangeStream(Stream) const noexcept override { return only(); }
  void record(void**, const Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return DEVICES; }
  c10::DeviceIndex current_device() const override { return current; }
  c10::DeviceIndex getCurrentDevice() const override { return current; }
  at::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
};

// The same memory as storages of the host and of the device, within one operation.
class Shared {
 public:
  c10::Storage on_host(const c10::Storage& storage) {
    auto [found, is_new] = host_.try_emplace(storage.unsafeGetStorageImpl());
    if (is_new) {
      found->second = alias(storage, Device(c10::kCPU));
      device_[found->second.unsafeGetStorageImpl()] = storage;
    }
    return found->second;
  }

  c10::Storage on_device(const c10::Storage& storage, Device where) const {
    auto found = device_.find(storage.unsafeGetStorageImpl());
    bool same = found != device_.end() && found->second.data() == storage.data(); // or it was resized meanwhile
    return same ? found->second : alias(storage, where);
  }

 private:
  static c10::Storage alias(const c10::Storage& storage, Device where) {
    auto release = [](void* kept) { delete static_cast<c10::Storage*>(kept); };
    c10::DataPtr memory(const_cast<void*>(storage.data()), new c10::Storage(storage), release, where);
    return c10::Storage(
        c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(memory), c10::GetCPUAllocator(), true);
  }

  std::unordered_map<c10::StorageImpl*, c10::Storage> host_, device_;
};

Tensor view_like(const Tensor& tensor, c10::Storage storage, DispatchKey key) {
  auto view = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(tensor.storage_offset());
  view.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  return view;
}

Tensor as_cpu(const Tensor& tensor) {
  return view_like(tensor, Shared().on_host(tensor.storage()), DispatchKey::CPU);
}

void on_host(const c10::OperatorHandle& operation, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Shared shared;
  Device where = device();
  bool is_on_device = false, is_on_host = false, is_on_two = false;
  std::vector<std::pair<Tensor, Tensor>> inputs; // as given, and on the host
  auto enter = [&](const Tensor& tensor, bool is_written, bool is_index = false) {
    if (!tensor.defined()) {
      return tensor;
    }
    if (!tensor.is_cuda()) {
      is_on_host |= !is_index && (tensor.dim() > 0 || is_written); // indices, and numbers that are read, may be there
      inputs.emplace_back(tensor, tensor);
      return tensor;
    }
    is_on_two |= is_on_device && where != tensor.device();
    is_on_device = true;
    where = tensor.device();
    return inputs.emplace_back(tensor, view_like(tensor, shared.on_host(tensor.storage()), DispatchKey::CPU)).second;
  };
  auto leave = [&](const Tensor& tensor) {
    if (!tensor.defined()) {
      return tensor;
    }
    for (auto& [given, entered] : inputs) {
      if (entered.is_same(tensor)) {
        return given;
      }
    }
    return view_like(tensor, shared.on_device(tensor.storage(), where), DispatchKey::CUDA);
  };

  const auto& schema = operation.schema();
  const auto& arguments = schema.arguments();
  for (size_t number = 0; number < arguments.size(); ++number) {
    auto& word = torch::jit::peek(*stack, number, arguments.size());
    const auto* alias = arguments[number].alias_info();
    bool is_written = alias && alias->isWrite();
    if (word.isTensor()) {
      word = enter(word.toTensor(), is_written);
    } else if (word.isTensorList()) {
      std::vector<Tensor> entered;
      for (const Tensor& tensor : word.toTensorVector()) {
        entered.push_back(enter(tensor, is_written));
      }
      word = c10::IValue(entered);
    } else if (word.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> entered;
      for (const std::optional<Tensor>& tensor : word.toOptionalTensorVector()) {
        entered.push_back(tensor ? std::optional<Tensor>(enter(*tensor, false, true)) : std::nullopt);
      }
      word = c10::IValue(entered);
    } else if (word.isDevice() && word.toDevice().is_cuda()) {
      where = word.toDevice().has_index() ? word.toDevice() : where;
      is_on_device = true;
      word = Device(c10::kCPU);
    }
  }
  TORCH_CHECK(
      !((is_on_device && is_on_host) || is_on_two) || schema.name() == "aten::copy_",
      "Expected all tensors to be on the same device, but ", schema.name(), " has not");
  operation.callBoxed(stack);
  for (auto& [given, entered] : inputs) { // some operations resize what they write into
    bool is_as_before = entered.sizes() == given.sizes() && entered.strides() == given.strides() &&
        entered.storage_offset() == given.storage_offset() && entered.storage().data() == given.storage().data();
    if (given.is_cuda() && !is_as_before) {
      auto* tensor = given.unsafeGetTensorImpl();
      tensor->set_storage_keep_dtype(shared.on_device(entered.storage(), where));
      tensor->set_storage_offset(entered.storage_offset());
      tensor->set_sizes_and_strides(entered.sizes(), entered.strides());
    }
  }
  for (auto& value : torch::jit::last(*stack, schema.returns().size())) {
    auto& word = const_cast<c10::IValue&>(value);
    if (word.isTensor()) {
      word = leave(word.toTensor());
    } else if (word.isTensorList()) {
      std::vector<Tensor> left;
      for (const Tensor& tensor : word.toTensorVector()) {
        left.push_back(leave(tensor));
      }
      word = c10::IValue(left);
    }
  }
}

int64_t plain_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0; // the CPU's fused kernel has another signature than CUDA's
}

} // namespace

C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, ::Hooks)
} // namespace at

namespace c10d {
struct HostTimer final : public Timer {
  explicit HostTimer(c10::Device) {}
  std::optional<int64_t> measureDifference(Event start, Event end) override {
    return getTimeRef(end) - getTimeRef(start);
  }
};
C10_REGISTER_TYPED_CLASS(TimerRegistry, c10::kCUDA, HostTimer);
} // namespace c10d

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_host>()); // or torch looks for CUDA's kernel
  library.impl("_fused_sdp_choice", &plain_attention);
}

TORCH_LIBRARY(stand_in, library) {
  library.def("as_cpu(Tensor tensor) -> Tensor");
}

TORCH_LIBRARY_IMPL(stand_in, CUDA, library) {
  library.impl("as_cpu", &as_cpu);
}
