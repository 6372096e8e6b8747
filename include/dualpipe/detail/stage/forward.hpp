#pragma once

#include <ATen/core/Tensor.h>

#include <cstddef>
#include <iterator>
#include <tuple>
#include <type_traits>
#include <utility>

#include "dualpipe/comm/pending.hpp"

// Calls a forward, or a function, with as many tensors as there are, and makes Tensors of what it returns.
namespace dualpipe::detail {

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

template <class Module>
inline constexpr unsigned arities = forward_arities<Module>(std::make_index_sequence<max_forward_tensors>());

template <class Module>
inline constexpr bool takes_any_tensors = takes_list<Module> || arities<Module> != 0;

/// Tries N, N + 1, … until one is the number of inputs.
///
/// @param unfit  called where forward takes another number; throws.
template <std::size_t N, class Module, class Unfit>
Tensors call_with(Module& module, const Tensors& inputs, const Unfit& unfit) {
  if constexpr (N > max_forward_tensors) {
    unfit();
    return {};
  } else {
    if constexpr (takes_tensors<Module, N>) {
      if (inputs.size() == N) {
        return [&]<std::size_t... I>(std::index_sequence<I...>) {
          return to_tensors(module.forward(inputs[I]...));
        }(std::make_index_sequence<N>());
      }
    }
    return call_with<N + 1>(module, inputs, unfit);
  }
}

template <class Module, class Unfit>
Tensors call_forward(Module& module, const Tensors& inputs, const Unfit& unfit) {
  if constexpr (takes_list<Module>) {
    return to_tensors(module.forward(inputs));
  } else {
    return call_with<1>(module, inputs, unfit);
  }
}

/// A function in the shape of a module.
template <class Function>
struct AsForward {
  Function function;

  template <class... Arguments>
  auto forward(const Arguments&... arguments) -> decltype(std::declval<Function&>()(arguments...)) {
    return function(arguments...);
  }
};

}  // namespace dualpipe::detail
