#include "dualpipe/detail/pipeline/arrival_memory.hpp"

#include <ATen/ATen.h>
#include <c10/util/hash.h>

namespace dualpipe {
namespace {

/// A number that differs, as good as always, where something else was added.
class Digest {
 public:
  void add(std::size_t value) { sum_ = c10::hash_combine(sum_, value); }
  void add(const Tensors& tensors) {
    add(tensors.size());
    for (const at::Tensor& tensor : tensors) {
      add(tensor.defined() ? 2 + (tensor.requires_grad() ? 1 : 0) : 0);
      if (!tensor.defined()) continue;
      add(static_cast<std::size_t>(tensor.scalar_type()));
      add(static_cast<std::size_t>(tensor.dim()));
      for (const std::int64_t size : tensor.sizes()) add(static_cast<std::size_t>(size));
    }
  }
  std::int64_t value() const { return static_cast<std::int64_t>(sum_); }

 private:
  std::size_t sum_ = 0;
};

}  // namespace

std::function<Arrivals&()> ArrivalMemory::recall(const Plan& plan, const RunInputs& inputs,
                                                 const torch::nn::Module& module) {
  if (!communicator_->gains_from_expected()) return nullptr;
  Digest digest;
  digest.add(inputs.training ? 1 : 0);
  for (const Batch& batch : inputs.micro_batches) {
    digest.add(batch.inputs);
    digest.add(batch.extras);
  }
  module.apply([&](const torch::nn::Module& each) {
    digest.add(each.is_training() ? 1 : 0);
    digest.add(each.parameters(/*recurse=*/false));
  });
  Pending all = communicator_->control().all_gather(at::scalar_tensor(digest.value(), at::kLong));
  return [this, &plan, all = std::move(all)]() mutable -> Arrivals& {
    std::pair<const Plan*, Conditions> key{&plan, {}};
    for (const at::Tensor& each : all.take()) key.second.push_back(*each.const_data_ptr<std::int64_t>());
    if (const auto found = learned_.find(key); found != learned_.end()) return found->second;
    if (learned_.size() == kMost) learned_.clear();
    return learned_[std::move(key)] = {data_dependent_from_,
                                       std::vector<std::optional<Signature>>(plan.program.order.size())};
  };
}

}  // namespace dualpipe
