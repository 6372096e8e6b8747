#pragma once

#include <torch/nn/pimpl.h>

#include <concepts>
#include <cstddef>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/forward.hpp"

namespace dualpipe {

/// The data of one step: whole tensors that are split along one dimension into micro-batches, or micro-batches made by
/// hand, of any number. Each rank may pass only what it needs: inputs where it feeds the first stage, targets where it
/// computes the loss. Ranks that pass the same member must pass the same values.
struct Batch {
  Tensors inputs = {};   ///< of the first stage
  Tensors targets = {};  ///< given to the loss function
  Tensors extras = {};   ///< side inputs that every stage sees (StageContext::extras); may be empty
  /// Of the losses, one for each micro-batch, such as the numbers of tokens that they average over; finite, none
  /// negative, the sum over all replicas positive. Any ranks may pass them, in each replica or in none. Empty: all are
  /// 1. A micro-batch of weight 0 is not trained, whatever its loss is.
  std::vector<double> weights = {};
  std::vector<Batch> micro_batches =
      {};  ///< set by from_micro_batches and chunk alone; then the tensors above are empty

  /// Micro-batch i is element i. Sizes may differ. Each has one weight, or none has.
  DUALPIPE_DECL static Batch from_micro_batches(std::vector<Batch> micro_batches);
  /// At most `count` micro-batches whose sizes differ by one at most, as many as there are samples if these are fewer.
  /// Their weights are their sizes, so that means over samples add up to the mean over the batch.
  ///
  /// @param dim, split  as DualPipeOptions::batch_dim and split.
  /// @throws InvalidArgument  tensors with different numbers of samples or with none; a batch that was cut before; a list
  ///                          of another length.
  DUALPIPE_DECL Batch chunk(int count, int dim = 0, const BatchSplit& split = {}) const;
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

/// A loss with metrics behind it.
template <class Values>
concept LossValues = !std::convertible_to<Values, at::Tensor> && requires(Values values) { to_tensors(values); };

template <class Loss>
concept MetricsOfLists = !ModuleHolder<Loss> && LossValues<std::invoke_result_t<Loss&, const Tensors&, const Tensors&>>;

template <class Loss>
concept MetricsOfTensors = !ModuleHolder<Loss> && !MetricsOfLists<Loss> &&
                           LossValues<std::invoke_result_t<Loss&, const at::Tensor&, const at::Tensor&>>;

}  // namespace detail

/// From the outputs of the last stage and the targets of a micro-batch to a floating-point tensor of one element. Where
/// there is one output and one target, also a function of these two tensors, or a module as torch::nn::MSELoss is.
///
/// A function may return metrics behind the loss, as Tensors or a tuple: up to `max_metrics` tensors of one element, as
/// many for each micro-batch. They are summed as they are in float64, over all micro-batches and replicas: counts of up
/// to 2^53 are exact. Right: the number of right answers and that of all answers.  Wrong: their quotient.
///
/// The mean of the micro-batches' means is the mean of the batch only where all of them have as much to average over;
/// else Batch::weights say how much. A mean over nothing is NaN, as that of cross_entropy is where all targets have the
/// index to ignore: such a micro-batch needs the weight 0.
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
          check_one_each(outputs, targets);
          return loss(outputs.front(), targets.front());
        }) {}
  template <class Contained>
  LossFn(const torch::nn::ModuleHolder<Contained>& module)
      : LossFn([module = module.ptr()](const at::Tensor& output, const at::Tensor& target) {
          return module->forward(output, target);
        }) {}
  template <detail::MetricsOfLists Loss>
  LossFn(Loss loss)
      : LossFn(std::in_place, [loss = std::move(loss)](const Tensors& outputs, const Tensors& targets) mutable {
          return detail::to_tensors(loss(outputs, targets));
        }) {}
  template <detail::MetricsOfTensors Loss>
  LossFn(Loss loss)
      : LossFn(std::in_place, [loss = std::move(loss)](const Tensors& outputs, const Tensors& targets) mutable {
          check_one_each(outputs, targets);
          return detail::to_tensors(loss(outputs.front(), targets.front()));
        }) {}
  // NOLINTEND(google-explicit-constructor)

  static constexpr int max_metrics = 32;

  /// The loss, and the metrics behind it.
  Tensors values(const Tensors& outputs, const Tensors& targets) const {
    return values_ ? values_(outputs, targets) : Tensors{(*this)(outputs, targets)};
  }

 private:
  using Values = std::function<Tensors(const Tensors& outputs, const Tensors& targets)>;

  LossFn(std::in_place_t, Values values)
      : function([values](const Tensors& outputs, const Tensors& targets) { return values(outputs, targets).at(0); }),
        values_(std::move(values)) {}
  static void check_one_each(const Tensors& outputs, const Tensors& targets) {
    DUALPIPE_CHECK(outputs.size() == 1 && targets.size() == 1,
                   "the loss function takes one output and one target, but there are ", outputs.size(), " outputs and ",
                   targets.size(), " targets; let it take (const Tensors&, const Tensors&)");
  }

  Values values_;  // null: the function has no metrics
};

/// Micro-batch i is the i-th of `count` equal slices (views) of every tensor along `dim`, or what `split` says, or the
/// i-th element made by hand.
///
/// @throws InvalidArgument  a tensor that `count` does not divide along `dim`, another number of tensors than `split`
///                          has entries, or another number of micro-batches made by hand.
DUALPIPE_DECL std::vector<Batch> split_batch(const Batch& batch, int count, int dim, const BatchSplit& split = {});

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/pipeline/batch.ipp"
#endif
