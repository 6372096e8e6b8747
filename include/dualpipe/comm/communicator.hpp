#pragma once

#include <ATen/core/Tensor.h>

#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/device_trace.hpp"
#include "dualpipe/comm/pending.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe {

/// What a receiver learns of a tensor beside its values.
struct TensorSignature {
  bool defined = true;
  bool requires_grad = false;
  at::ScalarType dtype = at::ScalarType::Float;
  std::vector<std::int64_t> sizes;
  bool operator==(const TensorSignature&) const = default;
};
using Signature = std::vector<TensorSignature>;
Signature signature_of(const Tensors& tensors);
/// "[float32 [4, 8] requires_grad, undefined]"
std::string to_string(const Signature& signature);

/// What a receiver knows of a message before it comes.
struct Expected {
  Expected(Signature what, std::string hint = {})  // NOLINT(google-explicit-constructor): mostly a signature alone
      : signature(std::move(what)), advice(std::move(hint)) {}
  Signature signature;
  std::string advice;  ///< what the error adds where something else comes: whose it is, and the way out; may be empty
};

/// A directed pair of ranks between which tensors travel.
struct Edge {
  int from = 0;
  int to = 0;
  auto operator<=>(const Edge&) const = default;
};

enum class Reduce { sum, max, min };

/// Moves tensors between ranks. Used by one thread. All ranks of a communicator call its collectives in one order, and
/// between two ranks the k-th send meets the k-th receive; collectives and sends do not match each other. Every message
/// carries what both ends must agree on (epoch, sequence, signature); a mismatch is a CommError on both ends that shows
/// both.
///
/// Right: post a receive early, compute, take().  Wrong: take() on both of two ranks before either sends: both wait for
/// the deadline.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// Destructors never throw and never wait for a peer. Destroying a communicator without abort() lets peers see an
  /// orderly goodbye: only operations that still need this rank fail.
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  virtual at::Device device() const = 0;

  /// Moves what is the hosts' own business between the same ranks: tensors of the CPU, whose wait() and take() hold up
  /// the host alone. Where this communicator's own tensors are on the CPU, itself. Calls of one do not match calls of
  /// the other. Lives as long as this one.
  virtual Communicator& control() { return *this; }
  /// Whether a receive begins earlier where it is told what to expect. Where not, finding that out is for nothing.
  virtual bool gains_from_expected() const noexcept { return false; }

  /// When the device does what this rank's thread asks of it; null where that is at once, on the CPU. Lives as long as
  /// this one.
  virtual DeviceTrace* device_trace() noexcept { return nullptr; }

  /// Collective, at most once: announces the edges that sends and receives will use, so that a back end can open and
  /// warm them up.
  virtual void connect(const std::vector<Edge>& edges) = 0;

  /// @param tensors  any count, dtypes and sizes; undefined ones arrive undefined; non-contiguous ones travel
  /// contiguous. Kept until taken
  ///                 over by the transfer; writing to one in place before wait() is an error that wait() reports (by
  ///                 its version counter).
  virtual Pending send(int peer, Tensors tensors) = 0;
  /// @param expected  what must arrive, or nullopt to take whatever the message's header says.
  virtual Pending receive(int peer, const std::optional<Expected>& expected = std::nullopt) = 0;

  /// In place, element-wise over all ranks in rank order, so that the result is bitwise the same everywhere. Same
  /// signature on all ranks. take() gives the tensors passed in.
  virtual Pending all_reduce(Tensors tensors, Reduce reduce = Reduce::sum) = 0;
  /// In place: `tensors` of rank `root` replace those of the others. Same signature on all ranks; as in all_reduce,
  /// requires_grad is each rank's own affair.
  virtual Pending broadcast(Tensors tensors, int root) = 0;
  /// take() gives size() tensors, that of rank r at r; sizes may differ from rank to rank.
  ///
  /// @param expected  what must come from each rank, this one included, or nullopt to take what comes. Each rank
  ///                  chooses for itself; where it knows, its device need not wait for what the other hosts say.
  virtual Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected = std::nullopt) = 0;
  /// `tensors[r]` goes to rank r; take() gives size() tensors, that from rank r at r. Sizes may be uneven, also empty.
  /// `expected` as in all_gather().
  virtual Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected = std::nullopt) = 0;
  virtual Pending barrier() = 0;

  /// Over when everything is that the current stream was given until now; on the CPU, at once. Sends nothing.
  virtual Pending fence() = 0;

  /// Collective. Ranks with the same non-negative color form a communicator, ordered by key, then by rank here; color <
  /// 0: not a member, null. The results belong to one family: an abort of any member aborts all.
  virtual std::shared_ptr<Communicator> split(int color, int key) = 0;

  /// Makes pending and later calls of the whole family throw CommError with this rank as origin and `reason` as its
  /// message, on every rank. Pending ones include those that are over but were not waited for. From any thread. Does
  /// nothing after the first.
  virtual void abort(const std::string& reason) noexcept = 0;

 protected:
  Communicator(int rank, int size) : rank_(rank), size_(size) {}

 private:
  int rank_;
  int size_;
};

}  // namespace dualpipe
