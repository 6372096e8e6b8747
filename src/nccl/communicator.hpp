#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

#include "nccl/context.hpp"
#include "nccl/nccl_trace.hpp"

namespace dualpipe::detail {

struct NcclCommunicatorOptions {
  std::chrono::milliseconds timeout = std::chrono::minutes(5);
  bool communicator_per_edge = false;
  bool start_when_both_ready = false;
  std::string name = {};
  CtaLimits transfer_ctas = {};
  CtaLimits collective_ctas = {};
  CtaLimits sum_ctas = {};  ///< of collectives in groups that sum gradients
  /// Largest tensor of the warm-up: NCCL chooses its algorithm by size, and connects each at its first use.
  std::size_t largest_warm_up_bytes = std::size_t{256} << 10;
};

/// Operations on whose signature all ranks have agreed before: they are launched without waiting for the peers'
/// headers. Headers are still compared, and a mismatch is an error on all ranks.
class KnownSignatures {
 public:
  bool contains(const std::string& key) const { return keys_.contains(key); }
  void insert(std::string key) {
    if (keys_.size() < capacity) keys_.insert(std::move(key));
  }

 private:
  static constexpr std::size_t capacity = 4096;  // bounds the memory where shapes never repeat
  std::unordered_set<std::string> keys_;
};

/// A communicator for the tensors of one device. Each operation is announced to its peers over the control plane, with
/// everything that both ends must agree on; NcclContext launches it.
class NcclCommunicator final : public Communicator {
 public:
  /// Collective. @param control  a local or socket communicator of the world that nobody else uses.
  static std::shared_ptr<NcclCommunicator> world(const std::shared_ptr<Communicator>& control,
                                                 std::shared_ptr<DeviceApi> device, std::shared_ptr<NcclApi> nccl,
                                                 const NcclCommunicatorOptions& options);
  /// Collective over the members of `group`; see world() and split_for().
  NcclCommunicator(std::shared_ptr<NcclContext> context, std::int64_t group, const std::vector<int>& members, int rank,
                   const GroupUse& use, NcclCommunicatorOptions options);

  at::Device device() const override { return context_->device().device(); }
  Communicator& control() override { return control_; }
  bool gains_from_expected() const noexcept override { return true; }
  DeviceTrace* device_trace() noexcept override { return &trace_; }
  void connect(const std::vector<Edge>& edges) override;
  Pending send(int peer, Tensors tensors) override;
  Pending receive(int peer, const std::optional<Expected>& expected) override;
  Pending all_reduce(Tensors tensors, Reduce reduce) override;
  Pending broadcast(Tensors tensors, int root) override;
  Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override;
  Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override;
  Pending barrier() override;
  std::vector<std::string> commit(std::string ballot) override { return control_.commit(std::move(ballot)); }
  Pending fence() override;
  std::shared_ptr<Communicator> split(int color, int key) override { return split_for({}, color, key); }
  std::shared_ptr<Communicator> split_for(const GroupUse& use, int color, int key) override;
  void abort(const std::string& reason) noexcept override;

 private:
  int world_rank(int rank) const override { return control_.members()[rank]; }
  void announce(int peer, Header header);
  /// Announces a collective to the other ranks. Returns their announcements, which must equal `expected`, by rank.
  std::vector<std::shared_ptr<Request>> announce_to_all(const Header& own, const std::vector<Header>& expected);
  std::vector<std::shared_ptr<Request>> announce_to_all(const Header& head);
  /// A new operation, called from the current stream.
  std::shared_ptr<NcclOperation> make_operation(Request request, std::vector<std::shared_ptr<Request>> headers,
                                                CommStream on) const;
  struct Route {
    CommStream on;
    NcclContext::QueueId queue;
    int peer;  ///< the other rank in that communicator
    StartFlags::End* start;
  };
  /// The way of a transfer between this rank and `peer`, another rank of this communicator.
  Route route(Edge edge, int peer) const;
  Pending exchange(const char* operation, Tensors outgoing, const std::optional<Signature>& expected);
  /// Runs `issue` with `count` buffers of `bytes` bytes, and returns when the device has finished.
  void warm_up(CommStream on, NcclContext::QueueId queue, std::size_t count, std::size_t bytes,
               std::function<void(const NcclOperation&, NcclApi&, CommStream)> issue);
  void warm_up_transfers(const std::vector<Edge>& edges);
  void warm_up_collectives();
  void warm_up_exchanges();
  void open_edge(Edge edge);
  void add_start_flags(const std::vector<Edge>& edges);

  std::shared_ptr<NcclContext> context_;
  NcclTrace trace_;
  NcclCommunicatorOptions options_;
  MessageCommunicator control_;  // the same ranks; its own group, so that its messages are no announcements
  GroupHeaders headers_;
  NcclContext::QueueId transfer_queue_;
  NcclContext::QueueId collective_queue_;
  CommStream collectives_;
  std::optional<CommStream> transfers_;      // opened by connect()
  std::map<Edge, CommStream> edges_;         // communicators of two ranks: 0 sends, 1 receives
  std::map<Edge, StartFlags::End*> starts_;  // of edges that connect() announced, if their ends start together
  std::shared_ptr<KnownSignatures> known_ = std::make_shared<KnownSignatures>();
};

}  // namespace dualpipe::detail
