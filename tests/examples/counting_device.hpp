#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <cstddef>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

// A device for tests (PrivateUse1 in LibTorch): the CPU under another name, which notes what makes the host wait for a
// device. Included by one file of a program, as it registers itself.
namespace dualpipe::test {

inline const c10::Device counting_device{c10::DeviceType::PrivateUse1, 0};

namespace counting {

inline std::vector<std::string>& notes() {
  thread_local std::vector<std::string> all;
  return all;
}

/// Operations whose result has a size that depends on values, or is a value.
inline bool reads(const std::string& operation) {
  static const std::set<std::string> all = {
      "_local_scalar_dense", "nonzero", "masked_select", "bincount",         "_unique2", "unique_dim",
      "unique_consecutive",  "equal",   "histc",         "repeat_interleave"};
  return all.contains(operation.substr(operation.find(':') + 2));
}

/// The same memory on another device.
inline at::Tensor on(c10::Device device, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.device() == device) return tensor;
  auto owner = std::make_unique<c10::Storage>(tensor.storage());
  void* const memory = owner->mutable_data();
  c10::DataPtr data(memory, owner.release(), [](void* storage) { delete static_cast<c10::Storage*>(storage); }, device);
  c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(), std::move(data), nullptr, false);
  const auto key = device.is_cpu() ? c10::DispatchKey::CPU : c10::DispatchKey::PrivateUse1;
  at::Tensor result =
      at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), tensor.dtype());
  result.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

inline c10::IValue on(c10::Device device, const c10::IValue& value) {
  if (value.isTensor()) return on(device, value.toTensor());
  if (value.isDevice()) return device;
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& each : value.toTensorVector()) list.push_back(on(device, each));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const c10::IValue& each : value.toListRef())
      list.push_back(each.isTensor() ? std::optional(on(device, each.toTensor())) : std::nullopt);
    return list;
  }
  return value;
}

/// Any operation: on the CPU, with the same memory.
inline void run(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
  const c10::FunctionSchema& schema = operation.schema();
  if (reads(schema.name())) notes().push_back(schema.name());
  const auto num_arguments = static_cast<std::ptrdiff_t>(schema.arguments().size());
  const std::vector<c10::IValue> given(stack->end() - num_arguments, stack->end());
  for (auto value = stack->end() - num_arguments; value != stack->end(); ++value) *value = on(at::kCPU, *value);
  operation.callBoxed(*stack);
  const std::size_t first = stack->size() - schema.returns().size();
  for (std::size_t r = 0; r < schema.returns().size(); ++r) {
    c10::IValue& result = (*stack)[first + r];
    const auto* const written = schema.returns()[r].alias_info();
    const auto is_it = [&](const c10::Argument& argument) {
      const auto* const info = argument.alias_info();
      return info != nullptr && info->isWrite() && info->beforeSets() == written->beforeSets();
    };
    const auto& arguments = schema.arguments();
    const auto same = written != nullptr && written->isWrite() ? std::find_if(arguments.begin(), arguments.end(), is_it)
                                                               : arguments.end();
    result = same == arguments.end() ? on(counting_device, result)
                                     : given[static_cast<std::size_t>(same - arguments.begin())];
  }
}

inline at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.device() != from.device())
    notes().push_back(std::string(non_blocking ? "copy" : "blocking copy") + (to.is_cpu() ? " to the host" : ""));
  on(at::kCPU, to).copy_(on(at::kCPU, from));
  return to;
}

inline bool exchangeable(const at::Tensor&, const at::Tensor&) { return true; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return counting_device.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return counting_device; }
  c10::Device getDevice() const override { return counting_device; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, counting_device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void** event, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override { notes().emplace_back("event"); }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&run>()); }
TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("copy_", &copy);
  library.impl("_has_compatible_shallow_copy_type", &exchangeable);
}

}  // namespace counting

/// What has made the calling thread wait since the last call, and copies without a wait.
inline std::vector<std::string> take_host_waits() { return std::exchange(counting::notes(), {}); }

}  // namespace dualpipe::test
