// CUDA tensors that live in the CPU's memory: every operator that CUDA has no kernel for (all, in a CPU build of
// torch) runs the CPU's on aliases of them, and what comes back is called CUDA's again. Loaded by rehearse.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <unordered_map>
#include <vector>

namespace {

constexpr auto kGPU = c10::DeviceType::CUDA;

c10::Device gpu() { return c10::impl::getDeviceGuardImpl(kGPU)->getDevice(); }

// The memory of a storage under the other device's name; it keeps that storage alive.
c10::Storage renamed(const c10::Storage& storage, c10::Device device) {
  auto* held = new c10::Storage(storage);
  auto release = [](void* context) { delete static_cast<c10::Storage*>(context); };
  c10::DataPtr data(storage.mutable_data(), held, release, device);
  auto* allocator = device.is_cpu() ? c10::GetAllocator(c10::DeviceType::CPU) : nullptr;
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, device.is_cpu()};
}

at::Tensor with_storage(const at::Tensor& tensor, c10::Storage storage, c10::DispatchKey key) {
  auto result = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides());
  impl->set_storage_offset(tensor.storage_offset());
  return result;
}

struct Call {
  std::unordered_map<c10::StorageImpl*, c10::Storage> away, home;  // GPU's storage -> CPU's, and back
  std::unordered_map<c10::TensorImpl*, at::Tensor> given;          // what the operator gets -> what was meant
  std::vector<at::Tensor> aliases;                                 // alive as long as they are looked up

  c10::Storage to_cpu(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    if (!away.count(key)) {
      away.emplace(key, renamed(storage, c10::kCPU));
      home.emplace(away.at(key).unsafeGetStorageImpl(), storage);
    }
    return away.at(key);
  }

  c10::Storage to_gpu(const c10::Storage& storage) {
    auto* key = storage.unsafeGetStorageImpl();
    return home.count(key) ? home.at(key) : renamed(storage, gpu());
  }

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.device().type() != kGPU) {
      given.emplace(tensor.unsafeGetTensorImpl(), tensor);
      return tensor;
    }
    auto alias = with_storage(tensor, to_cpu(tensor.storage()), c10::DispatchKey::CPU);
    given.emplace(alias.unsafeGetTensorImpl(), tensor);
    aliases.push_back(alias);
    return alias;
  }

  at::Tensor to_gpu(const at::Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    auto known = given.find(tensor.unsafeGetTensorImpl());
    if (known != given.end()) return known->second;
    return with_storage(tensor, to_gpu(tensor.storage()), c10::DispatchKey::CUDA);
  }

  c10::IValue in(const c10::IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isStorage() && value.toStorage().device().type() == kGPU) return to_cpu(value.toStorage());
    if (value.isDevice()) return c10::Device(c10::kCPU);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_cpu(tensor));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& tensor : value.toOptionalTensorVector())
        list.push_back(tensor ? std::make_optional(to_cpu(*tensor)) : std::nullopt);
      return list;
    }
    return value;
  }

  c10::IValue out(const c10::IValue& value) {
    if (value.isTensor()) return to_gpu(value.toTensor());
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(to_gpu(tensor));
      return list;
    }
    return value;
  }

  // What an operator has resized (`out=`) or given another storage is so on the GPU too.
  void follow() {
    for (auto& [key, storage] : away) {
      if (storage.data() == key->data() && storage.nbytes() == key->nbytes()) continue;
      auto fresh = renamed(storage, gpu());
      key->set_nbytes(storage.nbytes());
      key->set_data_ptr_noswap(fresh.unsafeGetStorageImpl()->set_data_ptr({nullptr, gpu()}));
    }
    for (auto& [alias, tensor] : given) {
      auto* impl = tensor.unsafeGetTensorImpl();
      if (alias == impl) continue;
      auto storage = to_gpu(alias->storage());
      if (storage.unsafeGetStorageImpl() != impl->storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(std::move(storage));
      if (alias->sizes() != impl->sizes() || alias->strides() != impl->strides())
        impl->set_sizes_and_strides(alias->sizes(), alias->strides());
      if (alias->storage_offset() != impl->storage_offset()) impl->set_storage_offset(alias->storage_offset());
    }
  }
};

void on_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call call;
  const auto arguments = op.schema().arguments().size();
  const auto first = stack->size() - arguments;
  for (auto i = first; i < stack->size(); ++i) (*stack)[i] = call.in((*stack)[i]);
  op.callBoxed(stack);
  call.follow();
  for (auto i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) (*stack)[i] = call.out((*stack)[i]);
}

// Has one form for all devices, which looks for CUDA's kernels further in.
TORCH_LIBRARY_IMPL(aten, CUDA, library) { library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

struct Silent final : c10::WarningHandler {
  void process(const c10::Warning&) override {}
};

// Collectives, by gloo in place of NCCL. That they replace torch's own is no news.
TORCH_LIBRARY_IMPL(c10d, CUDA, library) {
  Silent silent;
  c10::WarningUtils::WarningHandlerGuard guard(&silent);
  for (const char* name : {"allreduce_", "_reduce_scatter_base_", "_allgather_base_", "broadcast_", "allgather_"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_cpu>());
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_cpu>()); }

}  // namespace
