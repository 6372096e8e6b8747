#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <tuple>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/comm/transport.hpp"

// Back ends without device streams differ only in how a message travels. A Transport moves messages between the ranks
// of the world; a MessageCommunicator makes sends, receives, collectives and groups of them, once for all transports.
// Ranks are world ranks here, except in the Communicator interface of a group.
namespace dualpipe::detail {

/// A group of ranks of a transport.
class MessageCommunicator final : public Communicator {
 public:
  /// `members[r]` is the world rank of rank r.
  /// @param device  of the tensors that travel: the transport's, or the CPU.
  MessageCommunicator(std::shared_ptr<Transport> transport, std::int64_t group, std::vector<int> members, int rank,
                      at::Device device);
  /// All ranks of the world, group 0.
  static std::shared_ptr<MessageCommunicator> world(std::shared_ptr<Transport> transport);

  const std::shared_ptr<Transport>& transport() const noexcept { return transport_; }
  std::int64_t group() const noexcept { return group_; }
  /// World ranks of this communicator's ranks.
  const std::vector<int>& members() const noexcept { return members_; }

  at::Device device() const override { return device_; }
  Communicator& control() override;
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
  Header header(Channel channel, std::string operation, std::uint64_t sequence, Signature signature) const;
  Header next_collective(std::string operation, Signature signature);
  std::vector<std::shared_ptr<Request>> receive_from_others(const Header& head);
  /// Nobody may write to `shared` any more.
  void send_to_others(const Header& head, const Tensors& shared);
  /// `outgoing[r]` to rank r and what rank r sends here at r of the result; all on `device`.
  Pending exchange(const char* operation, Tensors outgoing, at::Device device,
                   const std::optional<Signature>& expected = std::nullopt);
  Pending pending(const Header& head, std::vector<std::shared_ptr<Request>> transfers, Watch watched,
                  std::function<Tensors()> finish);

  std::shared_ptr<Transport> transport_;
  std::int64_t group_;
  std::vector<int> members_;
  at::Device device_;
  std::unique_ptr<MessageCommunicator> control_;  // of a device, once it is asked for
  std::vector<std::uint64_t> sends_;              // to each rank so far
  std::vector<std::uint64_t> receives_;           // from each rank so far
  std::uint64_t collectives_ = 0;
};

}  // namespace dualpipe::detail
