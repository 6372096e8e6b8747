#pragma once

#include "dualpipe/detail/comm/message.hpp"

#include <utility>

namespace dualpipe::detail {

GroupHeaders::GroupHeaders(std::int64_t group, std::int32_t epoch, std::size_t num_ranks, bool tensors_follow)
    : group_(group), epoch_(epoch), tensors_follow_(tensors_follow), sends_(num_ranks, 0), receives_(num_ranks, 0) {}

Header GroupHeaders::next_send(std::size_t peer, Signature signature) {
  return make(Channel::transfer, "send", sends_.at(peer)++, std::move(signature));
}

Header GroupHeaders::next_receive(std::size_t peer, Signature expected) {
  return make(Channel::transfer, "send", receives_.at(peer)++, std::move(expected));
}

Header GroupHeaders::next_collective(std::string operation, Signature signature) {
  return make(Channel::collective, std::move(operation), collectives_++, std::move(signature));
}

Header GroupHeaders::local(std::string operation) const {
  return make(Channel::collective, std::move(operation), collectives_, {});
}

Header GroupHeaders::make(Channel channel, std::string operation, std::uint64_t sequence, Signature signature) const {
  return {.group = group_,
          .channel = channel,
          .epoch = epoch_,
          .sequence = sequence,
          .issued_ns = now_ns(),
          .operation = std::move(operation),
          .signature = std::move(signature),
          .tensors_follow = tensors_follow_};
}

std::string Request::operation() const {
  if (header.channel == Channel::collective) return header.operation;
  return str(kind == Kind::send ? "send to rank " : "receive from rank ", peer);
}

std::string Request::describe() const {
  return str(operation(), header.channel == Channel::collective ? " (collective " : " (message ", header.sequence,
             " of group ", header.group, ")");
}

Request Request::without_message() const {
  Request copy;
  copy.kind = kind;
  copy.peer = peer;
  copy.header = header;
  return copy;
}

Request Request::collective(const Header& header) {
  Request whole;
  whole.kind = Request::Kind::receive;
  whole.header = header;
  return whole;
}

}  // namespace dualpipe::detail
