#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/detail/comm/transport.hpp"

namespace dualpipe::detail {

/// Sends, receives, collectives and groups made of a transport's messages: all of a back end but the way of a message.
/// Ranks are those of the transport here, except in the functions of Communicator.
class MessageCommunicator final : public Communicator {
 public:
  /// @param members  the transport's ranks of this communicator's ranks.
  /// @param device   of the tensors that travel: the transport's, or the CPU.
  DUALPIPE_DECL MessageCommunicator(std::shared_ptr<Transport> transport, std::int64_t group, std::vector<int> members,
                                    int rank, at::Device device);
  /// All ranks of the transport: group 0.
  DUALPIPE_DECL static std::shared_ptr<MessageCommunicator> world(std::shared_ptr<Transport> transport);

  const std::shared_ptr<Transport>& transport() const noexcept { return transport_; }
  std::int64_t group() const noexcept { return headers_.group(); }
  const std::vector<int>& members() const noexcept { return members_; }

  int world_rank(int rank) const override { return members_[rank]; }
  at::Device device() const override { return device_; }
  DUALPIPE_DECL Communicator& control() override;
  SharedValues* shared_values() noexcept override { return transport_->shared_values(); }
  DUALPIPE_DECL void connect(const std::vector<Edge>& edges) override;
  DUALPIPE_DECL Pending send(int peer, Tensors tensors) override;
  DUALPIPE_DECL Pending receive(int peer, const std::optional<Expected>& expected) override;
  DUALPIPE_DECL Pending all_reduce(Tensors tensors, Reduce reduce) override;
  DUALPIPE_DECL Pending broadcast(Tensors tensors, int root) override;
  DUALPIPE_DECL Pending all_gather(at::Tensor tensor, const std::optional<Signature>& expected) override;
  DUALPIPE_DECL Pending all_to_all(Tensors tensors, const std::optional<Signature>& expected) override;
  DUALPIPE_DECL Pending barrier() override;
  DUALPIPE_DECL std::vector<std::string> commit(std::string ballot) override;
  DUALPIPE_DECL Pending fence() override;
  DUALPIPE_DECL std::shared_ptr<Communicator> split(int color, int key) override;
  DUALPIPE_DECL void abort(const std::string& reason) noexcept override;

 private:
  DUALPIPE_DECL Requests receive_from_others(const Header& head);
  /// Nobody may write to `shared` any more.
  DUALPIPE_DECL void send_to_others(const Header& head, const Tensors& shared);
  /// `outgoing[r]` goes to rank r, and element r of the result comes from rank r; all on `device`.
  DUALPIPE_DECL Pending exchange(const char* operation, Tensors outgoing, at::Device device,
                                 const std::optional<Signature>& expected = std::nullopt);
  DUALPIPE_DECL Pending pending(const Header& head, Requests requests, Watch watched, std::function<Tensors()> finish);

  std::shared_ptr<Transport> transport_;
  std::vector<int> members_;
  at::Device device_;
  std::unique_ptr<MessageCommunicator> control_;  // of a device, made on the first call
  GroupHeaders headers_;
};

}  // namespace dualpipe::detail

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/comm/message_communicator.ipp"
#endif
