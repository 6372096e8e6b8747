#include "dualpipe/detail/comm/message_communicator.hpp"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>
#include <utility>

#include "dualpipe/detail/comm/arguments.hpp"
#include "dualpipe/detail/comm/message_operation.hpp"

namespace dualpipe::detail {
namespace {

/// Gives the tensors of an arrived message as their sender described them.
Tensors unpack(MessageTensors& parcel, const Signature& signature) {
  Tensors tensors = parcel.take();
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].defined()) tensors[i].set_requires_grad(signature[i].requires_grad);
  }
  return tensors;
}

void combine(at::Tensor& into, const at::Tensor& other, Reduce reduce) {
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

std::string to_text(const at::Tensor& edges) {
  std::string text;
  const auto values = edges.accessor<std::int64_t, 2>();
  for (std::int64_t i = 0; i < values.size(0); ++i) {
    text += str(text.empty() ? "" : ", ", values[i][0], "->", values[i][1]);
  }
  return text.empty() ? "no edges" : text;
}

}  // namespace

MessageCommunicator::MessageCommunicator(std::shared_ptr<Transport> transport, std::int64_t group,
                                         std::vector<int> members, int rank, at::Device device)
    : Communicator(rank, static_cast<int>(members.size())),
      transport_(std::move(transport)),
      group_(group),
      members_(std::move(members)),
      device_(device),
      sends_(members_.size(), 0),
      receives_(members_.size(), 0) {}

std::shared_ptr<MessageCommunicator> MessageCommunicator::world(std::shared_ptr<Transport> transport) {
  std::vector<int> members(static_cast<std::size_t>(transport->size()));
  std::iota(members.begin(), members.end(), 0);
  const int rank = transport->rank();
  const at::Device device = transport->device();
  return std::make_shared<MessageCommunicator>(std::move(transport), 0, std::move(members), rank, device);
}

Communicator& MessageCommunicator::control() {
  if (device_.is_cpu()) return *this;
  if (!control_) control_ = std::make_unique<MessageCommunicator>(transport_, -1 - group_, members_, rank(), at::kCPU);
  return *control_;
}

Header MessageCommunicator::header(Channel channel, std::string operation, std::uint64_t sequence,
                                   Signature signature) const {
  return {.group = group_,
          .channel = channel,
          .epoch = transport_->epoch(),
          .sequence = sequence,
          .issued_ns = now_ns(),
          .operation = std::move(operation),
          .signature = std::move(signature)};
}

Header MessageCommunicator::next_collective(std::string operation, Signature signature) {
  return header(Channel::collective, std::move(operation), collectives_++, std::move(signature));
}

Pending MessageCommunicator::send(int peer, Tensors tensors) {
  const std::size_t index = checked_peer(*this, "send", peer);
  auto parcel = MessageTensors::of(tensors, device());
  Message message{header(Channel::transfer, "send", sends_[index]++, signature_of(tensors)), std::move(parcel), {}};
  Watch watched(tensors);
  tensors.clear();  // the parcel alone refers to them now, so that the receiver may get the very memory
  auto transfer = transport_->send(members_[index], std::move(message));
  Request whole = transfer->without_message();
  return Pending(std::make_shared<MessageOperation>(transport_, device_, std::move(whole),
                                                    Requests{std::move(transfer)}, std::move(watched), nullptr));
}

Pending MessageCommunicator::receive(int peer, const std::optional<Expected>& expected) {
  const std::size_t index = checked_peer(*this, "receive", peer);
  auto transfer = transport_->receive(
      members_[index],
      header(Channel::transfer, "send", receives_[index]++, expected ? expected->signature : Signature()), !expected,
      expected ? expected->advice : std::string());
  Request whole = transfer->without_message();
  auto finish = [transfer = transfer.get()] {
    return unpack(*transfer->message.parcel, transfer->message.header.signature);
  };
  return Pending(std::make_shared<MessageOperation>(transport_, device_, std::move(whole),
                                                    Requests{std::move(transfer)}, Watch(), std::move(finish)));
}

// Every rank sends to every other, whatever the size: then no rank's result depends on when another rank calls wait(),
// which a reduction by parts in several rounds would ask for.
Pending MessageCommunicator::all_reduce(Tensors tensors, Reduce reduce) {
  check_reduce(tensors, reduce);
  // A copy: this rank writes its sum while others still read its contribution.
  const Tensors own = MessageTensors::of(tensors, device())->take();
  const Header head = next_collective(name(reduce), signature_of_values(tensors));
  const Requests receives = receive_from_others(head);
  send_to_others(head, own);
  auto finish = [tensors, own, receives, me = static_cast<std::size_t>(rank()), reduce]() mutable {
    const c10::NoGradGuard no_grad;
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      if (!tensors[i].defined()) continue;
      for (std::size_t r = 0; r < receives.size(); ++r) {
        const at::Tensor& part = r == me ? own[i] : receives[r]->message.parcel->tensors()[i];
        if (r == 0) {
          tensors[i].copy_(part);
        } else {
          combine(tensors[i], part, reduce);
        }
      }
    }
    return tensors;
  };
  return pending(head, receives, Watch(tensors), std::move(finish));
}

// Those that have nothing to give send an empty message, so that ranks that disagree about the root learn it.
Pending MessageCommunicator::broadcast(Tensors tensors, int root) {
  const std::size_t source = checked_root(*this, root);
  const Signature signature = signature_of_values(tensors);
  const Tensors values = root == rank() ? MessageTensors::of(tensors, device())->take() : Tensors();
  Header head = next_collective(str("broadcast from rank ", members_[source]), {});
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
      if (tensors[i].defined()) tensors[i].copy_(from_root->message.parcel->tensors()[i]);
    }
    return tensors;
  };
  return pending(head, std::move(receives), std::move(watched), std::move(finish));
}

Pending MessageCommunicator::all_gather(at::Tensor tensor, const std::optional<Signature>& expected) {
  return exchange("all_gather", Tensors(static_cast<std::size_t>(size()), tensor), device_, expected);
}

Pending MessageCommunicator::all_to_all(Tensors tensors, const std::optional<Signature>& expected) {
  return exchange("all_to_all", std::move(tensors), device_, expected);
}

Pending MessageCommunicator::barrier() {
  const Header head = next_collective("barrier", {});
  const Requests receives = receive_from_others(head);
  send_to_others(head, {});
  return pending(head, receives, Watch(), nullptr);
}

Pending MessageCommunicator::fence() {
  return Pending(
      std::make_shared<MessageFence>(transport_, device_, header(Channel::collective, "fence", collectives_, {})));
}

Pending MessageCommunicator::exchange(const char* operation, Tensors outgoing, at::Device device,
                                      const std::optional<Signature>& expected) {
  check_exchange(*this, operation, outgoing, expected);
  std::vector<std::shared_ptr<MessageTensors>> parcels;
  for (const at::Tensor& tensor : outgoing) parcels.push_back(MessageTensors::of({tensor}, device));
  const Header head = next_collective(operation, {});
  Requests receives(outgoing.size());
  for (std::size_t r = 0; r < outgoing.size(); ++r) {
    if (static_cast<int>(r) == rank()) continue;
    Header from = head;
    if (expected) from.signature = {(*expected)[r]};
    receives[r] = transport_->receive(members_[r], std::move(from), !expected);
  }
  Requests transfers = receives;
  std::vector<Signature> signatures;
  for (std::size_t r = 0; r < outgoing.size(); ++r) {
    signatures.push_back(signature_of({outgoing[r]}));
    if (static_cast<int>(r) == rank()) continue;
    Message message{head, parcels[r], {}};
    message.header.signature = signatures[r];
    transfers.push_back(transport_->send(members_[r], std::move(message)));
  }
  const auto me = static_cast<std::size_t>(rank());
  auto finish = [receives, own = parcels[me], own_signature = signatures[me], me] {
    Tensors result;
    for (std::size_t r = 0; r < receives.size(); ++r) {
      Tensors part = r == me ? unpack(*own, own_signature)
                             : unpack(*receives[r]->message.parcel, receives[r]->message.header.signature);
      result.push_back(std::move(part.front()));
    }
    return result;
  };
  return pending(head, std::move(transfers), Watch(outgoing), std::move(finish));
}

Requests MessageCommunicator::receive_from_others(const Header& head) {
  Requests receives;
  for (int r = 0; r < size(); ++r) {
    receives.push_back(r == rank() ? nullptr : transport_->receive(members_[static_cast<std::size_t>(r)], head, false));
  }
  return receives;
}

void MessageCommunicator::send_to_others(const Header& head, const Tensors& shared) {
  for (int i = 1; i < size(); ++i) {
    const int r = (rank() + i) % size();  // not all to rank 0 first
    transport_->send(members_[static_cast<std::size_t>(r)], {head, MessageTensors::of_fresh(shared, device()), {}});
  }
}

Pending MessageCommunicator::pending(const Header& head, Requests transfers, Watch watched,
                                     std::function<Tensors()> finish) {
  std::erase(transfers, nullptr);
  return Pending(std::make_shared<MessageOperation>(transport_, device_, Request::collective(head),
                                                    std::move(transfers), std::move(watched), std::move(finish)));
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
  const Tensors all = exchange("connect", Tensors(static_cast<std::size_t>(size()), own), at::kCPU).take();
  for (std::size_t r = 0; r < all.size(); ++r) {
    if (at::equal(all[r], own)) continue;
    Request whole = Request::collective(header(Channel::collective, "connect", collectives_ - 1, {}));
    transport_->raise(
        members_[r], whole,
        str("this rank announces ", to_text(own), "; rank ", members_[r], " announces ", to_text(all[r])));
  }
}

std::shared_ptr<Communicator> MessageCommunicator::split(int color, int key) {
  const auto own = at::tensor({std::int64_t{color}, std::int64_t{key}, transport_->next_group()}, at::kLong);
  const Tensors all = exchange("split", Tensors(static_cast<std::size_t>(size()), own), at::kCPU).take();
  std::vector<std::int64_t> colors;
  std::vector<std::pair<std::int64_t, int>> order;  // key and rank here of those with this rank's color
  std::int64_t first_group = 0;
  for (int r = 0; r < size(); ++r) {
    const auto values = all[static_cast<std::size_t>(r)].accessor<std::int64_t, 1>();
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
    members.push_back(members_[static_cast<std::size_t>(r)]);
  }
  const auto index = std::lower_bound(colors.begin(), colors.end(), color) - colors.begin();
  return std::make_shared<MessageCommunicator>(transport_, first_group + index, std::move(members), rank_there,
                                               device_);
}

void MessageCommunicator::abort(const std::string& reason) noexcept { transport_->abort(transport_->rank(), reason); }

}  // namespace dualpipe::detail
