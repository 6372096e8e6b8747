#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/device_trace.hpp"
#include "dualpipe/comm/pending.hpp"
#include "dualpipe/detail/config.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe {
namespace detail {
class SharedValues;
}

/// What a receiver learns of a tensor beside its values.
struct TensorSignature {
  bool defined = true;
  bool requires_grad = false;
  at::ScalarType dtype = at::ScalarType::Float;
  std::vector<std::int64_t> sizes;
  bool operator==(const TensorSignature&) const = default;
};
using Signature = std::vector<TensorSignature>;
DUALPIPE_DECL Signature signature_of(const Tensors& tensors);
/// "[float32 [4, 8] requires_grad, undefined]"
DUALPIPE_DECL std::string to_string(const Signature& signature);

/// What a receiver knows of a message before it arrives.
struct Expected {
  Expected(Signature what, std::string hint = {})  // NOLINT(google-explicit-constructor): mostly a signature alone
      : signature(std::move(what)), advice(std::move(hint)) {}
  Signature signature;
  std::string advice;  ///< ends the error about another signature: whose message it is, and the way out; may be empty
};

enum class Reduce { sum, max, min };

/// What a communicator will be used for, for a back end that saves what others do not need.
struct GroupUse {
  bool exchanges = true;  ///< all_to_all and all_gather are used; else NCCL connects their peers at the first use
  bool sums = false;      ///< gradients are summed, under which little computes: they may occupy more of a device
};

/// Moves tensors between ranks. Used by one thread. All ranks of a communicator call its collectives in one order, and
/// between two ranks the k-th send matches the k-th receive; collectives and sends do not match each other. Both ends
/// of a message must agree on its epoch, sequence and signature; a mismatch is a CommError on both ends that shows
/// both.
///
/// Right: post a receive early, compute, take().  Wrong: take() on both of two ranks before either sends: both wait for
/// the deadline.
///
/// A communicator and all that were split from it, on all ranks, are a family: they fail together.
///
/// What every back end does is tested by one suite. A back end may differ in these points, and then says so; portable
/// programs assume the worse case of each:
///   - send() and receive() return at once; those of testing::serial() return when the other end has come.
///   - A send may complete, and its rank may leave, before the receiver has come; with NCCL it completes with the
///     receive.
///   - Transfers of one rank are independent; with NCCL they run one after the other (unless each edge has its own
///     communicator), so all ranks must issue theirs in one global order.
///   - all_reduce adds in rank order; NCCL chooses its own order. The result is bitwise the same on all ranks in any
///     case.
///   - A deadline names the rank for which all others wait, directly or not; with NCCL, and between wrappers, the rank
///     for which the operation waits.
///   - Span::begin of a receive is exact between ranks of one host; across hosts the difference of the clocks is an
///     estimate.
class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  /// A directed pair of ranks between which tensors travel.
  struct Edge {
    int from = 0;
    int to = 0;
    auto operator<=>(const Edge&) const = default;
  };

  /// Destructors never throw and never wait for a peer. Destroying a communicator without abort() tells peers that this
  /// rank has left: only operations that still need it fail.
  virtual ~Communicator() = default;
  Communicator(const Communicator&) = delete;
  Communicator& operator=(const Communicator&) = delete;

  int rank() const noexcept { return rank_; }
  int size() const noexcept { return size_; }
  /// The number that `rank` of this communicator has among all ranks, as errors name it.
  virtual int world_rank(int rank) const { return rank; }
  virtual at::Device device() const = 0;

  /// A CPU communicator over the same ranks; `*this` on the CPU. Calls of one do not match calls of the other. Lives as
  /// long as `*this`.
  virtual Communicator& control() { return *this; }
  /// True if a known signature lets a receive start earlier.
  virtual bool gains_from_expected() const noexcept { return false; }

  /// Tells when the device executes what this rank queues; null on the CPU, where that is at once. Lives as long as
  /// `*this`.
  virtual DeviceTrace* device_trace() noexcept { return nullptr; }

  /// What ranks share that are threads of one process; null where a process has one rank. Lives as long as `*this`.
  virtual detail::SharedValues* shared_values() noexcept { return nullptr; }

  /// Collective, with the same edges on all ranks: announces edges that sends and receives will use, so that a back end
  /// can open and warm them up. Optional; may be called again, with other edges too.
  virtual void connect(const std::vector<Edge>& edges) = 0;

  /// @param tensors  any count, dtypes and sizes. Undefined ones arrive undefined, non-contiguous ones contiguous.
  ///                 Writing to one in place before wait() is an error, which wait() reports (by its version counter).
  virtual Pending send(int peer, Tensors tensors) = 0;
  /// @param expected  what must arrive, or nullopt to take whatever arrives.
  virtual Pending receive(int peer, const std::optional<Expected>& expected = std::nullopt) = 0;

  /// In place and element-wise over all ranks, with bitwise the same result on all. Same signature on all ranks, but
  /// for requires_grad. take() gives the tensors passed in.
  virtual Pending all_reduce(Tensors tensors, Reduce reduce = Reduce::sum) = 0;
  /// In place: `tensors` of rank `root` replace those of the others. Same signature on all ranks, but for
  /// requires_grad.
  virtual Pending broadcast(Tensors tensors, int root) = 0;
  /// take() gives size() tensors, that of rank r at r; sizes may differ from rank to rank.
  ///
  /// @param expected  what must come from each rank, this one included, or nullopt to take what comes. Each rank
  ///                  chooses for itself; with it, a device need not wait for the headers of the other ranks.
  virtual Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected = std::nullopt) = 0;
  /// `tensors[r]` goes to rank r; take() gives size() tensors, that from rank r at r. Sizes may be uneven, also empty.
  /// `expected` as in all_gather().
  virtual Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected = std::nullopt) = 0;
  virtual Pending barrier() = 0;

  /// Collective: the end of a step, which is over for all ranks or for none. If anything fails meanwhile, whichever rank
  /// learns of it first, either commit() returns on all ranks that go on, or it throws on all. Waits for the hosts of
  /// the other ranks, not for devices. After a failure it may return once more; the next call throws.
  ///
  /// @param ballot  of this rank, at most 4 MiB / size().
  /// @return  the ballots of all ranks, by rank.
  /// @throws CommError  the step is over nowhere; or this rank was cut off from the others and does not know, which the
  ///                    text says.
  virtual std::vector<std::string> commit(std::string ballot) = 0;

  /// Completes when the work already queued on the current stream completes; on the CPU, at once. Sends nothing.
  virtual Pending fence() = 0;

  /// Collective. Ranks with the same non-negative color form a communicator, ordered by key, then by rank here; color <
  /// 0: not a member, null. The results belong to the family of `*this`.
  virtual std::shared_ptr<Communicator> split(int color, int key) = 0;
  /// split() of communicators whose use is known. Same `use` on all ranks.
  virtual std::shared_ptr<Communicator> split_for(const GroupUse& /*use*/, int color, int key) {
    return split(color, key);
  }

  /// Makes pending and later calls of the whole family throw CommError on every rank, with this rank as origin and
  /// `reason` in the message. Completed operations that were not waited for throw as well. From any thread. Only the
  /// first abort counts.
  virtual void abort(const std::string& reason) noexcept = 0;

 protected:
  Communicator(int rank, int size) : rank_(rank), size_(size) {}

 private:
  int rank_;
  int size_;
};

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/communicator.ipp"
#endif
