#pragma once

#include <bit>
#include <cstddef>
#include <iterator>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dualpipe/stage/stage.hpp"

namespace dualpipe {
namespace detail {

/// More tensors than any forward of torch::nn takes; one with more takes Tensors.
inline constexpr std::size_t max_forward_tensors = 8;

template <std::size_t>
using TensorAt = const at::Tensor&;

template <class Module, class... Arguments>
concept ForwardTakes = requires(Module& module, Arguments... arguments) { module.forward(arguments...); };

template <class Module, std::size_t... I>
constexpr bool forward_takes(std::index_sequence<I...>) {
  return ForwardTakes<Module, TensorAt<I>...>;
}

/// Whether `module.forward(t1, …, tn)` compiles, default arguments counted in.
template <class Module, std::size_t N>
inline constexpr bool takes_tensors = forward_takes<Module>(std::make_index_sequence<N>());

/// Whether forward takes one list of tensors. A forward that compiles with any argument is a template, as Sequential's
/// is: it takes the tensors one by one.
struct AnyArgument {};
template <class Module>
inline constexpr bool takes_list = ForwardTakes<Module, const Tensors&> && !ForwardTakes<Module, const AnyArgument&>;

inline void append_tensors(Tensors& all, at::Tensor tensor) { all.push_back(std::move(tensor)); }
inline void append_tensors(Tensors& all, Tensors tensors) {
  all.insert(all.end(), std::make_move_iterator(tensors.begin()), std::make_move_iterator(tensors.end()));
}
template <class... Parts>
void append_tensors(Tensors& all, std::tuple<Parts...> parts) {
  std::apply([&](auto&... part) { (append_tensors(all, std::move(part)), ...); }, parts);
}
template <class First, class Second>
void append_tensors(Tensors& all, std::pair<First, Second> parts) {
  append_tensors(all, std::move(parts.first));
  append_tensors(all, std::move(parts.second));
}

template <class Result>
Tensors to_tensors(Result&& result) {
  Tensors all;
  append_tensors(all, std::forward<Result>(result));
  return all;
}

/// The numbers of tensors that forward takes, as bits.
template <class Module, std::size_t... N>
constexpr unsigned forward_arities(std::index_sequence<N...>) {
  return ((takes_tensors<Module, N + 1> ? 1U << (N + 1) : 0U) | ...);
}

/// Tries N, N + 1, … until one is the number of inputs.
template <std::size_t N, class Module>
Tensors call_forward(Module& module, const Tensors& inputs, const StageContext& context) {
  if constexpr (N > max_forward_tensors) {
    throw InvalidArgument(str("stage ", context.stage, " is a ", module.name(), ", whose forward does not take ",
                              inputs.size(), " tensors (micro-batch ", context.micro_batch, ")"));
  } else {
    if constexpr (takes_tensors<Module, N>) {
      if (inputs.size() == N) {
        return [&]<std::size_t... I>(std::index_sequence<I...>) {
          return to_tensors(module.forward(inputs[I]...));
        }(std::make_index_sequence<N>());
      }
    }
    return call_forward<N + 1>(module, inputs, context);
  }
}

template <class Holder>
auto module_pointer(const Holder& holder) {
  DUALPIPE_CHECK(!holder.is_empty(), "as_stage needs a module, got an empty holder");
  return holder.ptr();
}
template <class Module>
std::shared_ptr<Module> module_pointer(const std::shared_ptr<Module>& module) {
  DUALPIPE_CHECK(module != nullptr, "as_stage needs a module, got a null pointer");
  return module;
}

}  // namespace detail

/// A stage of one compute node, "forward", that is the module's forward.
///
/// @param module  a holder (torch::nn::Linear, torch::nn::Sequential, any TORCH_MODULE) or a std::shared_ptr to a
/// module. Its
///                forward takes one to eight tensors, one by one, or one Tensors, and returns a tensor, Tensors, or a
///                tuple or pair of these, also nested. The stage takes as many tensors as forward does, where that is
///                one number; what the first module of a Sequential takes is known to that module only.
/// @throws InvalidArgument  an empty holder or a null pointer.
template <class M>
Stage as_stage(M module) {
  auto pointer = detail::module_pointer(module);
  using Module = typename decltype(pointer)::element_type;
  Stage stage(pointer);
  if constexpr (detail::takes_list<Module>) {
    stage.compute("forward", [pointer](const Tensors& inputs, const StageContext&) {
      return detail::to_tensors(pointer->forward(inputs));
    });
  } else {
    constexpr unsigned arities =
        detail::forward_arities<Module>(std::make_index_sequence<detail::max_forward_tensors>());
    static_assert(arities != 0, "as_stage: the module has no forward that takes tensors; use Stage::compute");
    if constexpr ((arities & (arities - 1)) == 0) {
      stage.takes(std::countr_zero(arities));
    }
    stage.compute("forward", [pointer](const Tensors& inputs, const StageContext& context) {
      return detail::call_forward<1>(*pointer, inputs, context);
    });
  }
  return stage;
}

}  // namespace dualpipe
