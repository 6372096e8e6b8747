#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "nccl/family.hpp"
#include "nccl/trace.hpp"

namespace dualpipe::detail {

/// How an NcclCommunicator uses NCCL.
struct NcclUse {
  std::chrono::milliseconds timeout = std::chrono::minutes(5);
  bool communicator_per_edge = false;
  NcclConfig config = {};
};

/// Signatures that all ends have been seen to agree about: an operation with one of them is launched without waiting
/// for what the peers say of it. They still say it, and a disagreement ends the family.
class Agreed {
 public:
  bool contains(const std::string& text) const { return texts_.contains(text); }
  void insert(std::string text) {
    if (texts_.size() < kMost) texts_.insert(std::move(text));
  }

 private:
  static constexpr std::size_t kMost = 4096;  // shapes that never repeat must not fill the memory
  std::unordered_set<std::string> texts_;
};

/// Moves tensors of one device by NCCL. Each operation is announced over the control plane with all that both ends must
/// agree on; what the device does is in nccl_family.hpp.
class NcclCommunicator final : public Communicator {
 public:
  /// Collective. @param control  of the world: local or sockets, used by nobody else.
  static std::shared_ptr<NcclCommunicator> world(const std::shared_ptr<Communicator>& control,
                                                 std::shared_ptr<DeviceApi> device, std::shared_ptr<NcclApi> nccl,
                                                 const NcclUse& use);
  /// Collective over the ranks of group `group`; see world() and split().
  NcclCommunicator(std::shared_ptr<NcclFamily> family, std::int64_t group, const std::vector<int>& members, int rank,
                   bool communicator_per_edge);

  at::Device device() const override { return family_->device().device(); }
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
  Pending fence() override;
  std::shared_ptr<Communicator> split(int color, int key) override;
  void abort(const std::string& reason) noexcept override;

 private:
  int world_rank(int rank) const { return control_.members()[static_cast<std::size_t>(rank)]; }
  Header header(Channel channel, std::string operation, std::uint64_t sequence, Signature signature) const;
  Header next_collective(std::string operation, Signature signature);
  void announce(int peer, Header header);
  /// Announces a collective to all others; gives what they will say of it, which must be what is expected of each.
  std::vector<std::shared_ptr<Request>> announce_to_all(const Header& own, const std::vector<Header>& expected);
  std::vector<std::shared_ptr<Request>> announce_to_all(const Header& head);
  /// An operation that the caller's stream has just made ready.
  std::shared_ptr<Flight> flight(Request whole, std::vector<std::shared_ptr<Request>> headers, NcclLine line) const;
  const NcclLine& transfer_line(Edge edge) const;
  Pending exchange(const char* operation, Tensors outgoing, const std::optional<Signature>& expected);
  /// Returns when the device is through with it.
  void first_use(NcclLine line, NcclFamily::QueueId queue,
                 std::function<void(const Flight&, NcclApi&, NcclLine)> issue);
  void warm_up(const std::vector<Edge>& edges);
  void warm_up_collectives();

  std::shared_ptr<NcclFamily> family_;
  NcclTrace trace_;
  std::int64_t group_;
  bool communicator_per_edge_;
  MessageCommunicator control_;  // of the same ranks, in a group of its own
  std::vector<std::uint64_t> sends_;
  std::vector<std::uint64_t> receives_;
  std::uint64_t collectives_count_ = 0;
  NcclFamily::QueueId transfer_queue_;
  NcclFamily::QueueId collective_queue_;
  NcclLine transfers_;
  NcclLine collectives_;
  std::map<Edge, NcclLine> edges_;  // of two ranks: 0 sends, 1 receives
  std::shared_ptr<Agreed> agreed_ = std::make_shared<Agreed>();
};

}  // namespace dualpipe::detail
