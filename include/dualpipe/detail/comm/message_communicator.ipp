#pragma once

#include "dualpipe/detail/comm/message_communicator.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "dualpipe/detail/comm/arguments.hpp"
#include "dualpipe/detail/comm/message_operation.hpp"

namespace dualpipe::detail {

/// The tensors of an arrived message, as their sender described them.
inline Tensors take_message(Message& message) {
  return as_described(message.tensors->take(), message.header.signature);
}

inline void reduce_into(at::Tensor& into, const at::Tensor& other, Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      into.add_(other);
      return;
    case Reduce::max:
      at::maximum_out(into, into, other);
      return;
    case Reduce::min:
      at::minimum_out(into, into, other);
      return;
  }
}

inline std::string edges_text(const at::Tensor& edges) {
  std::string text;
  const auto values = edges.accessor<std::int64_t, 2>();
  for (std::int64_t i = 0; i < values.size(0); ++i) {
    text += str(text.empty() ? "" : ", ", values[i][0], "->", values[i][1]);
  }
  return text.empty() ? "no edges" : text;
}

MessageCommunicator::MessageCommunicator(std::shared_ptr<Transport> transport, std::int64_t group,
                                         std::vector<int> members, int rank, at::Device device)
    : Communicator(rank, static_cast<int>(members.size())),
      transport_(std::move(transport)),
      members_(std::move(members)),
      device_(device),
      headers_(group, transport_->epoch(), members_.size()) {}

std::shared_ptr<MessageCommunicator> MessageCommunicator::world(std::shared_ptr<Transport> transport) {
  std::vector<int> members(transport->size());
  std::iota(members.begin(), members.end(), 0);
  const int rank = transport->rank();
  const at::Device device = transport->device();
  return std::make_shared<MessageCommunicator>(std::move(transport), 0, std::move(members), rank, device);
}

Communicator& MessageCommunicator::control() {
  if (device_.is_cpu()) return *this;
  if (!control_) control_ = std::make_unique<MessageCommunicator>(transport_, -1 - group(), members_, rank(), at::kCPU);
  return *control_;
}

Pending MessageCommunicator::send(int peer, Tensors tensors) {
  const std::size_t index = checked_peer(*this, "send", peer);
  auto sent = MessageTensors::of(tensors, device());
  Message message{headers_.next_send(index, signature_of(tensors)), std::move(sent), {}};
  Watch watched(tensors);
  tensors.clear();  // only the message refers to them now: the receiver may get the very memory
  auto request = transport_->send(members_[index], std::move(message));
  Request whole = request->without_message();
  return Pending(std::make_shared<MessageOperation>(transport_, device_, std::move(whole), Requests{std::move(request)},
                                                    std::move(watched), nullptr));
}

Pending MessageCommunicator::receive(int peer, const std::optional<Expected>& expected) {
  const std::size_t index = checked_peer(*this, "receive", peer);
  auto request =
      transport_->receive(members_[index], headers_.next_receive(index, expected ? expected->signature : Signature()),
                          !expected, expected ? expected->advice : std::string());
  Request whole = request->without_message();
  auto finish = [request = request.get()] { return take_message(request->message); };
  return Pending(std::make_shared<MessageOperation>(transport_, device_, std::move(whole), Requests{std::move(request)},
                                                    Watch(), std::move(finish)));
}

// Every rank sends to every other, whatever the size. A reduction in several rounds would move less, but a rank could
// not finish before the others call wait().
Pending MessageCommunicator::all_reduce(Tensors tensors, Reduce reduce) {
  check_reduce(tensors, reduce);
  // A copy: this rank writes the result while others still read its contribution.
  const Tensors own = MessageTensors::of(tensors, device())->take();
  const Header head = headers_.next_collective(reduce_name(reduce), signature_of_values(tensors));
  const Requests receives = receive_from_others(head);
  send_to_others(head, own);
  auto finish = [tensors, own, receives, me = static_cast<std::size_t>(rank()), reduce]() mutable {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].defined()) continue;
      for (std::size_t r = 0; r < receives.size(); ++r) {
        const at::Tensor& part = r == me ? own[i] : receives[r]->message.tensors->tensors()[i];
        if (r == 0) {
          tensors[i].copy_(part);
        } else {
          reduce_into(tensors[i], part, reduce);
        }
      }
    }
    return tensors;
  };
  return pending(head, receives, Watch(tensors), std::move(finish));
}

// Ranks other than the root send an empty message: ranks that disagree about the root learn it.
Pending MessageCommunicator::broadcast(Tensors tensors, int root) {
  const std::size_t source = checked_root(*this, root);
  const Signature signature = signature_of_values(tensors);
  const Tensors values = root == rank() ? MessageTensors::of(tensors, device())->take() : Tensors();
  Header head = headers_.next_collective(str("broadcast from rank ", members_[source]), {});
  Requests receives(members_.size());
  for (std::size_t r = 0; r < members_.size(); ++r) {
    if (static_cast<int>(r) == rank()) continue;
    Header expected = head;
    if (r == source) expected.signature = signature;
    receives[r] = transport_->receive(members_[r], std::move(expected), false);
  }
  if (root == rank()) head.signature = signature;
  send_to_others(head, values);
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), from_root = receives[source]]() mutable {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = 0; i < tensors.size() && from_root != nullptr; ++i) {
      if (tensors[i].defined()) tensors[i].copy_(from_root->message.tensors->tensors()[i]);
    }
    return tensors;
  };
  return pending(head, std::move(receives), std::move(watched), std::move(finish));
}

Pending MessageCommunicator::all_gather(at::Tensor tensor, const std::optional<Signature>& expected) {
  return exchange("all_gather", Tensors(size(), tensor), device_, expected);
}

Pending MessageCommunicator::all_to_all(Tensors tensors, const std::optional<Signature>& expected) {
  return exchange("all_to_all", std::move(tensors), device_, expected);
}

Pending MessageCommunicator::barrier() {
  const Header head = headers_.next_collective("barrier");
  const Requests receives = receive_from_others(head);
  send_to_others(head, {});
  return pending(head, receives, Watch(), nullptr);
}

std::vector<std::string> MessageCommunicator::commit(std::string ballot) {
  const std::size_t limit = (std::size_t{4} << 20) / members_.size();
  DUALPIPE_CHECK(ballot.size() <= limit, "commit: the ballot has ", ballot.size(), " bytes, but ", members_.size(),
                 " ranks may have ", limit, " each");
  return transport_->commit(group(), members_, std::move(ballot));
}

Pending MessageCommunicator::fence() {
  return Pending(std::make_shared<MessageFence>(transport_, device_, headers_.local("fence")));
}

Pending MessageCommunicator::exchange(const char* operation, Tensors outgoing, at::Device device,
                                      const std::optional<Signature>& expected) {
  check_exchange(*this, operation, outgoing, expected);
  std::vector<std::shared_ptr<MessageTensors>> sent;
  for (const at::Tensor& tensor : outgoing) sent.push_back(MessageTensors::of({tensor}, device));
  const Header head = headers_.next_collective(operation);
  Requests receives(outgoing.size());
  for (std::size_t r = 0; r < outgoing.size(); ++r) {
    if (static_cast<int>(r) == rank()) continue;
    Header from = head;
    if (expected) from.signature = {(*expected)[r]};
    receives[r] = transport_->receive(members_[r], std::move(from), !expected);
  }
  Requests requests = receives;
  std::vector<Signature> signatures;
  for (std::size_t r = 0; r < outgoing.size(); ++r) {
    signatures.push_back(signature_of({outgoing[r]}));
    if (static_cast<int>(r) == rank()) continue;
    Message message{head, sent[r], {}};
    message.header.signature = signatures[r];
    requests.push_back(transport_->send(members_[r], std::move(message)));
  }
  const auto me = static_cast<std::size_t>(rank());
  auto finish = [receives, own = sent[me], own_signature = signatures[me], me] {
    Tensors result;
    for (std::size_t r = 0; r < receives.size(); ++r) {
      Tensors part = r == me ? as_described(own->take(), own_signature) : take_message(receives[r]->message);
      result.push_back(std::move(part.front()));
    }
    return result;
  };
  return pending(head, std::move(requests), Watch(outgoing), std::move(finish));
}

Requests MessageCommunicator::receive_from_others(const Header& head) {
  Requests receives;
  for (int r = 0; r < size(); ++r) {
    receives.push_back(r == rank() ? nullptr : transport_->receive(members_[r], head, false));
  }
  return receives;
}

void MessageCommunicator::send_to_others(const Header& head, const Tensors& shared) {
  for (int i = 1; i < size(); ++i) {
    const int r = (rank() + i) % size();  // spreads the load: not all to rank 0 first
    transport_->send(members_[r], {head, MessageTensors::of_fresh(shared, device()), {}});
  }
}

Pending MessageCommunicator::pending(const Header& head, Requests requests, Watch watched,
                                     std::function<Tensors()> finish) {
  std::erase(requests, nullptr);
  return Pending(std::make_shared<MessageOperation>(transport_, device_, Request::collective(head), std::move(requests),
                                                    std::move(watched), std::move(finish)));
}

void MessageCommunicator::connect(const std::vector<Edge>& edges) {
  auto own = at::empty({static_cast<std::int64_t>(edges.size()), 2}, at::kLong);
  auto values = own.accessor<std::int64_t, 2>();
  for (std::size_t i = 0; i < edges.size(); ++i) {
    const auto& [from, to] = edges[i];
    DUALPIPE_CHECK(from >= 0 && from < size() && to >= 0 && to < size() && from != to, "connect: edge ", from, "->", to,
                   " is not between two of ", size(), " ranks");
    values[static_cast<std::int64_t>(i)][0] = from;
    values[static_cast<std::int64_t>(i)][1] = to;
  }
  const Request whole = Request::collective(headers_.local("connect"));
  const Tensors all = exchange("connect", Tensors(size(), own), at::kCPU).take();
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (at::equal(all[r], own)) continue;
    transport_->raise(
        members_[r], whole,
        str("this rank announces ", edges_text(own), "; rank ", members_[r], " announces ", edges_text(all[r])));
  }
}

std::shared_ptr<Communicator> MessageCommunicator::split(int color, int key) {
  const auto own = at::tensor({std::int64_t{color}, std::int64_t{key}, transport_->next_group()}, at::kLong);
  const Tensors all = exchange("split", Tensors(size(), own), at::kCPU).take();
  std::vector<std::int64_t> colors;
  std::vector<std::pair<std::int64_t, int>> order;  // key and rank here of those with this rank's color
  std::int64_t first_group = 0;
  for (int r = 0; r < size(); ++r) {
    const auto values = all[r].accessor<std::int64_t, 1>();
    if (values[0] >= 0) colors.push_back(values[0]);
    if (values[0] == color) order.emplace_back(values[1], r);
    first_group = std::max(first_group, values[2]);
  }
  std::sort(colors.begin(), colors.end());
  colors.erase(std::unique(colors.begin(), colors.end()), colors.end());
  transport_->set_next_group(first_group + static_cast<std::int64_t>(colors.size()));
  if (color < 0) return nullptr;

  std::sort(order.begin(), order.end());
  std::vector<int> members;
  int rank_there = 0;
  for (const auto& [member_key, r] : order) {
    if (r == rank()) rank_there = static_cast<int>(members.size());
    members.push_back(members_[r]);
  }
  const auto index = std::lower_bound(colors.begin(), colors.end(), color) - colors.begin();
  return std::make_shared<MessageCommunicator>(transport_, first_group + index, std::move(members), rank_there,
                                               device_);
}

void MessageCommunicator::abort(const std::string& reason) noexcept { transport_->abort(transport_->rank(), reason); }

}  // namespace dualpipe::detail
