#pragma once

#include <torch/nn/pimpl.h>

#include <concepts>
#include <cstddef>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/config.hpp"

namespace dualpipe {

/// The data of one step: whole tensors that are split along one dimension into micro-batches, or micro-batches made by
/// hand. Each rank may pass only what it needs: inputs where it feeds the first stage, targets where it computes the
/// loss. Ranks that pass the same member must pass the same values.
struct Batch {
  Tensors inputs = {};                    ///< of the first stage
  Tensors targets = {};                   ///< given to the loss function
  Tensors extras = {};                    ///< side inputs that every stage sees (StageContext::extras); may be empty
  std::vector<Batch> micro_batches = {};  ///< set by from_micro_batches alone; then the tensors above are empty

  /// Micro-batch i is element i. Sizes may differ.
  DUALPIPE_DECL static Batch from_micro_batches(std::vector<Batch> micro_batches);
  bool empty() const noexcept { return inputs.empty() && targets.empty() && extras.empty() && micro_batches.empty(); }
};

namespace detail {

template <class Contained>
void take_holder(const torch::nn::ModuleHolder<Contained>&);

/// LibTorch's holders cannot be asked whether they can be called with some arguments: that alone fails to compile.
template <class M>
concept ModuleHolder = requires(const M& holder) { take_holder(holder); };

template <class Loss>
concept LossOfLists =
    !ModuleHolder<Loss> && std::constructible_from<std::function<at::Tensor(const Tensors&, const Tensors&)>, Loss>;

template <class Loss>
concept LossOfTensors = !ModuleHolder<Loss> && !LossOfLists<Loss> &&
                        std::is_invocable_r_v<at::Tensor, Loss&, const at::Tensor&, const at::Tensor&>;

}  // namespace detail

/// From the outputs of the last stage and the targets of a micro-batch to a floating-point tensor of one element. Where
/// there is one output and one target, also a function of these two tensors, or a module as torch::nn::MSELoss is.
///
/// The mean of the micro-batches' means is the mean of the batch only where all of them have as much to average over. A
/// mean over nothing is NaN, and with it all gradients: that of cross_entropy, where all targets of a micro-batch have
/// the index to ignore. Where the numbers differ, divide the sum over what counts by how much counts in the whole batch,
/// known before the step, and add up with LossReduction::sum.
class LossFn : public std::function<at::Tensor(const Tensors& outputs, const Tensors& targets)> {
 public:
  LossFn() = default;
  // As std::function, these convert.
  // NOLINTBEGIN(google-explicit-constructor)
  LossFn(std::nullptr_t) {}
  template <class Loss>
    requires(!std::derived_from<Loss, LossFn> && detail::LossOfLists<Loss>)
  LossFn(Loss loss) : function(std::move(loss)) {}
  template <detail::LossOfTensors Loss>
  LossFn(Loss loss)
      : function([loss = std::move(loss)](const Tensors& outputs, const Tensors& targets) mutable -> at::Tensor {
          DUALPIPE_CHECK(outputs.size() == 1 && targets.size() == 1,
                         "the loss function takes one output and one target, but there are ", outputs.size(),
                         " outputs and ", targets.size(), " targets; let it take (const Tensors&, const Tensors&)");
          return loss(outputs.front(), targets.front());
        }) {}
  template <class Contained>
  LossFn(const torch::nn::ModuleHolder<Contained>& module)
      : LossFn([module = module.ptr()](const at::Tensor& output, const at::Tensor& target) {
          return module->forward(output, target);
        }) {}
  // NOLINTEND(google-explicit-constructor)
};

/// Micro-batch i is the i-th of `count` equal slices (views) of every tensor along `dim`, or the i-th element made by
/// hand.
///
/// @throws InvalidArgument  a tensor that `count` does not divide along `dim`, or another number of micro-batches made
///                          by hand.
DUALPIPE_DECL std::vector<Batch> split_batch(const Batch& batch, int count, int dim);

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/batch.ipp"
#endif
