#pragma once

#include <cstddef>
#include <optional>

#include "dualpipe/comm/communicator.hpp"

// Checks of arguments that all back ends share, and the names of calls in errors.
namespace dualpipe::detail {

inline const char* reduce_name(Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      return "all_reduce(sum)";
    case Reduce::max:
      return "all_reduce(max)";
    case Reduce::min:
      return "all_reduce(min)";
  }
  return "all_reduce";
}

/// Without requires_grad, which may differ between the ranks of an in-place collective.
inline Signature signature_of_values(const Tensors& tensors) {
  Signature signature = signature_of(tensors);
  for (TensorSignature& tensor : signature) tensor.requires_grad = false;
  return signature;
}

/// @return `peer`, as an index.
inline std::size_t checked_peer(const Communicator& communicator, const char* operation, int peer) {
  DUALPIPE_CHECK(peer >= 0 && peer < communicator.size(), operation, ": there is no rank ", peer,
                 " in this communicator of ", communicator.size(), " ranks");
  DUALPIPE_CHECK(peer != communicator.rank(), operation, ": peer ", peer,
                 " is this rank itself; keep the tensors instead");
  return static_cast<std::size_t>(peer);
}

inline std::size_t checked_root(const Communicator& communicator, int root) {
  DUALPIPE_CHECK(root >= 0 && root < communicator.size(), "broadcast: there is no rank ", root,
                 " in this communicator of ", communicator.size(), " ranks");
  return static_cast<std::size_t>(root);
}

inline void check_reduce(const Tensors& tensors, Reduce reduce) {
  for (const at::Tensor& tensor : tensors) {
    DUALPIPE_CHECK(reduce == Reduce::sum || !tensor.defined() || !tensor.is_complex(), reduce_name(reduce),
                   ": complex numbers have no order; only sum takes them");
  }
}

/// For all_gather and all_to_all: one tensor for each rank, and one signature from each.
inline void check_exchange(const Communicator& communicator, const char* operation, const Tensors& outgoing,
                           const std::optional<Signature>& expected) {
  const auto ranks = static_cast<std::size_t>(communicator.size());
  DUALPIPE_CHECK(outgoing.size() == ranks, operation, ": needs one tensor for each of the ", ranks, " ranks, got ",
                 outgoing.size(), "; give an empty one to a rank that gets nothing");
  if (!expected) return;
  DUALPIPE_CHECK(expected->size() == ranks, operation, ": what is expected needs one signature for each of the ", ranks,
                 " ranks, got ", expected->size());
  const auto me = static_cast<std::size_t>(communicator.rank());
  const Signature own = signature_of({outgoing[me]});
  DUALPIPE_CHECK(own.front() == (*expected)[me], operation, ": rank ", me, " expects ",
                 dualpipe::to_string({(*expected)[me]}), " of itself, but gives ", to_string(own));
}

}  // namespace dualpipe::detail
