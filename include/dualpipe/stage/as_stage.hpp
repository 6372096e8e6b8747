#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>
#include <utility>

#include "dualpipe/detail/stage/forward.hpp"
#include "dualpipe/stage/random.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe {
namespace detail {

template <class Contained>
std::shared_ptr<Contained> module_pointer(const torch::nn::ModuleHolder<Contained>& holder) {
  DUALPIPE_CHECK(!holder.is_empty(), "as_stage needs a module, got an empty holder");
  return holder.ptr();
}
template <std::derived_from<torch::nn::Module> Module>
std::shared_ptr<Module> module_pointer(const std::shared_ptr<Module>& module) {
  DUALPIPE_CHECK(module != nullptr, "as_stage needs a module, got a null pointer");
  return module;
}

template <class M>
concept OwnsModule = requires(const M& module) { module_pointer(module); };

}  // namespace detail

/// A stage of one compute node, "forward", that is the module's forward.
///
/// @param module  a holder (torch::nn::Linear, torch::nn::Sequential, any TORCH_MODULE) or a std::shared_ptr to a
///                module. Its forward takes one to eight tensors, one by one, or one Tensors, and returns a tensor,
///                Tensors, or a tuple or pair of these, also nested. The stage takes as many tensors as forward does,
///                where that is one number; what the first module of a Sequential takes is known to that module only.
/// @throws InvalidArgument  an empty holder or a null pointer.
template <class M>
Stage as_stage(const M& module) {
  static_assert(detail::OwnsModule<M>,
                "as_stage takes a module: a holder such as torch::nn::Linear, or a std::shared_ptr to a class that "
                "derives from torch::nn::Module");
  if constexpr (detail::OwnsModule<M>) {
    auto pointer = detail::module_pointer(module);
    using Module = typename decltype(pointer)::element_type;
    static_assert(detail::takes_any_tensors<Module>,
                  "as_stage: the module's class has no forward that takes tensors; name the class that has one instead "
                  "of torch::nn::Module, or use Stage::compute");
    Stage stage(pointer);
    if constexpr (!detail::takes_list<Module> && std::has_single_bit(detail::arities<Module>))
      stage.takes(std::countr_zero(detail::arities<Module>));
    if constexpr (detail::takes_any_tensors<Module>)
      stage.compute("forward", Compute([pointer](const Tensors& inputs, const StageContext& context) {
                      return detail::call_forward(*pointer, inputs, [&] {
                        throw InvalidArgument(detail::str("stage ", context.stage, " is a ", pointer->name(),
                                                          ", whose forward does not take ", inputs.size(),
                                                          " tensors (micro-batch ", context.micro_batch, ")"));
                      });
                    }));
    return stage;
  } else {
    return Stage();
  }
}

/// Makes a stage by its number: a function from int to a Stage, or to what as_stage takes.
class StageFactory : public std::function<Stage(int stage)> {
 public:
  /// Makes a stage of layers, each of them with a seed of its own.
  using Layered = std::function<Stage(int stage, const std::optional<std::uint64_t>& seed, at::Device device)>;

  StageFactory() = default;
  StageFactory(std::nullptr_t) {}  // NOLINT(google-explicit-constructor): as std::function
  template <class Factory>
    requires(!std::derived_from<std::remove_cvref_t<Factory>, StageFactory> && std::invocable<Factory&, int>)
  StageFactory(Factory factory)  // NOLINT(google-explicit-constructor): as std::function
      : std::function<Stage(int)>(returning_stage(std::move(factory))) {}
  StageFactory(Layered layered, int num_stages)
      : std::function<Stage(int)>([layered](int stage) { return layered(stage, std::nullopt, at::kCPU); }),
        layered_(std::move(layered)),
        num_stages_(num_stages) {}

  /// The stage as a pipeline with DualPipeOptions::seed makes it. What is drawn meanwhile from LibTorch's default
  /// generators, of the CPU and of `device`, as the first weights are, follows from the seed and the name of each layer
  /// (weights_seed); of a factory that split() did not make, "stage<k>". Then these generators have their state back. See
  /// SeededDefaults on threads.
  Stage make(int stage, std::uint64_t seed, at::Device device = at::kCPU) const {
    if (layered_) return layered_(stage, seed, device);
    const SeededDefaults scope(weights_seed(seed, detail::str("stage", stage)), device);
    return (*this)(stage);
  }

  /// How many stages split() has made of the model; 0: any number.
  int num_stages() const noexcept { return num_stages_; }

 private:
  template <class Factory>
  static std::function<Stage(int)> returning_stage(Factory factory) {
    using Made = std::invoke_result_t<Factory&, int>;
    if constexpr (std::convertible_to<Made, Stage>) {
      return factory;
    } else {
      static_assert(detail::OwnsModule<std::remove_cvref_t<Made>>,
                    "a stage factory returns a Stage or a module: a holder such as torch::nn::Linear, or a "
                    "std::shared_ptr to a class that derives from torch::nn::Module");
      return [factory = std::move(factory)](int stage) mutable { return as_stage(factory(stage)); };
    }
  }

  Layered layered_;
  int num_stages_ = 0;
};

}  // namespace dualpipe
