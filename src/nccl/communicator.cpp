#include "nccl/communicator.hpp"

#include <ATen/ATen.h>

#include <utility>

#include "dualpipe/detail/comm/arguments.hpp"
#include "nccl/operation.hpp"
#include "nccl/tensors.hpp"

namespace dualpipe::detail {
namespace {

using Headers = std::vector<std::shared_ptr<Request>>;

}  // namespace

Header NcclCommunicator::header(Channel channel, std::string operation, std::uint64_t sequence,
                                Signature signature) const {
  return {.group = group_,
          .channel = channel,
          .epoch = family_->transport().epoch(),
          .sequence = sequence,
          .issued_ns = now_ns(),
          .operation = std::move(operation),
          .signature = std::move(signature),
          .tensors_follow = false};
}

Header NcclCommunicator::next_collective(std::string operation, Signature signature) {
  return header(Channel::collective, std::move(operation), collectives_count_++, std::move(signature));
}

void NcclCommunicator::announce(int peer, Header header) {
  family_->transport().send(world_rank(peer), {std::move(header), MessageTensors::of({}), {}});
}

Headers NcclCommunicator::announce_to_all(const Header& own, const std::vector<Header>& expected) {
  Headers headers;
  for (int r = 0; r < size(); ++r)
    if (r != rank())
      headers.push_back(family_->transport().receive(world_rank(r), expected[static_cast<std::size_t>(r)], false));
  for (int i = 1; i < size(); ++i) announce((rank() + i) % size(), own);  // not all to rank 0 first
  return headers;
}

Headers NcclCommunicator::announce_to_all(const Header& head) {
  return announce_to_all(head, std::vector<Header>(static_cast<std::size_t>(size()), head));
}

std::shared_ptr<Flight> NcclCommunicator::flight(Request whole, Headers headers, NcclLine line) const {
  auto flight = std::make_shared<Flight>();
  flight->whole = std::move(whole);
  flight->headers = std::move(headers);
  flight->line = line;
  flight->caller = family_->device().current_stream();
  return flight;
}

const NcclLine& NcclCommunicator::transfer_line(Edge edge) const {
  const auto own = edges_.find(edge);
  return own == edges_.end() ? transfers_ : own->second;
}

Pending NcclCommunicator::send(int peer, Tensors tensors) {
  const std::size_t index = checked_peer(*this, "send", peer);
  Tensors sources = travelling("send", tensors, device());
  const Edge edge{rank(), peer};
  Request whole;
  whole.kind = Request::Kind::send;
  whole.peer = world_rank(peer);
  whole.header = header(Channel::transfer, "send", sends_[index], signature_of(tensors));

  auto flight = this->flight(whole, {}, transfer_line(edge));
  flight->waits_for_headers = false;
  flight->origin = whole.peer;
  flight->sources = std::move(sources);
  flight->ready = family_->record(flight->caller, flight->whole);
  flight->issue = [there = edges_.contains(edge) ? 1 : peer](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.sources.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.sources[i];
      if (!empty(tensor)) nccl.send(tensor.const_data_ptr(), tensor.nbytes(), there, line.comm, line.stream);
    });
  };
  announce(peer, whole.header);
  ++sends_[index];
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{.queue = transfer_queue_, .flight = std::move(flight), .watched = Watch(tensors)}));
}

Pending NcclCommunicator::receive(int peer, const std::optional<Expected>& expected) {
  const std::size_t index = checked_peer(*this, "receive", peer);
  const Edge edge{peer, rank()};
  Header head = header(Channel::transfer, "send", receives_[index]++, expected ? expected->signature : Signature());
  Request whole;
  whole.kind = Request::Kind::receive;
  whole.peer = world_rank(peer);
  whole.header = head;
  std::shared_ptr<Request> announced =
      family_->transport().receive(whole.peer, std::move(head), !expected, expected ? expected->advice : std::string());
  const auto signature = [announced]() -> const Signature& {
    return announced->any_signature ? announced->message.header.signature : announced->header.signature;
  };
  // What has come once needs no header the next time it is expected, whether it was expected then or not.
  const auto agreement = [peer](const Signature& what) { return str("receive ", peer, " ", to_string(what)); };

  auto flight = this->flight(whole, {announced}, transfer_line(edge));
  flight->waits_for_headers = !expected || !agreed_->contains(agreement(expected->signature));
  flight->origin = whole.peer;
  flight->prepare = [device = &family_->device(), signature](Flight& self) {
    self.targets = allocate(*device, signature(), self.caller);
  };
  flight->issue = [there = edges_.contains(edge) ? 0 : peer](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (!empty(tensor)) nccl.receive(tensor.mutable_data_ptr(), tensor.nbytes(), there, line.comm, line.stream);
    });
  };
  auto finish = [signature, agreement, agreed = agreed_](Flight& self) {
    if (self.waits_for_headers) agreed->insert(agreement(signature()));
    return described(std::move(self.targets), signature());
  };
  return Pending(std::make_shared<NcclOperation>(
      family_,
      NcclOperation::Parts{.queue = transfer_queue_, .flight = std::move(flight), .finish = std::move(finish)}));
}

Pending NcclCommunicator::all_reduce(Tensors tensors, Reduce reduce) {
  check_reduce(tensors, reduce);
  std::vector<Place> in_place = places(name(reduce), tensors, device(), /*as_bytes=*/false);
  const Header head = next_collective(name(reduce), signature_of_values(tensors));
  auto flight = this->flight(Request::collective(head), announce_to_all(head), collectives_);
  std::string agreement = head.operation + to_string(head.signature);
  flight->waits_for_headers = !agreed_->contains(agreement);
  flight->targets = memory_of(in_place);
  flight->ready = family_->record(flight->caller, flight->whole);
  flight->issue = [reduce](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (empty(tensor)) return;
      nccl.all_reduce(tensor.mutable_data_ptr(), static_cast<std::size_t>(tensor.numel()), tensor.scalar_type(), reduce,
                      line.comm, line.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place), agreement = std::move(agreement),
                 agreed = agreed_](Flight& self) mutable {
    if (self.waits_for_headers) agreed->insert(std::move(agreement));
    for (Place& place : in_place) place.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclOperation>(family_, NcclOperation::Parts{.queue = collective_queue_,
                                                                               .flight = std::move(flight),
                                                                               .watched = std::move(watched),
                                                                               .finish = std::move(finish)}));
}

// Those that have nothing to give announce nothing, so that ranks that disagree about the root learn it.
Pending NcclCommunicator::broadcast(Tensors tensors, int root) {
  const std::size_t source = checked_root(*this, root);
  std::vector<Place> in_place = places("broadcast", tensors, device(), /*as_bytes=*/true);
  const Signature signature = signature_of_values(tensors);
  Header own = next_collective(str("broadcast from rank ", world_rank(root)), {});
  std::vector<Header> expected(static_cast<std::size_t>(size()), own);
  expected[source].signature = signature;
  if (root == rank()) own.signature = signature;

  auto flight = this->flight(Request::collective(own), announce_to_all(own, expected), collectives_);
  std::string agreement = own.operation + to_string(signature);
  flight->waits_for_headers = !agreed_->contains(agreement);
  flight->targets = memory_of(in_place);
  flight->ready = family_->record(flight->caller, flight->whole);
  flight->issue = [root](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (!empty(tensor)) nccl.broadcast(tensor.mutable_data_ptr(), tensor.nbytes(), root, line.comm, line.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place), agreement = std::move(agreement),
                 agreed = agreed_, receives = root != rank()](Flight& self) mutable {
    if (self.waits_for_headers) agreed->insert(std::move(agreement));
    for (Place& place : in_place)
      if (receives) place.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclOperation>(family_, NcclOperation::Parts{.queue = collective_queue_,
                                                                               .flight = std::move(flight),
                                                                               .watched = std::move(watched),
                                                                               .finish = std::move(finish)}));
}

Pending NcclCommunicator::all_gather(at::Tensor tensor, const std::optional<Signature>& expected) {
  return exchange("all_gather", Tensors(static_cast<std::size_t>(size()), tensor), expected);
}

Pending NcclCommunicator::all_to_all(Tensors tensors, const std::optional<Signature>& expected) {
  return exchange("all_to_all", std::move(tensors), expected);
}

Pending NcclCommunicator::barrier() {
  const Header head = next_collective("barrier", {});
  auto flight = this->flight(Request::collective(head), announce_to_all(head), {});
  return Pending(std::make_shared<NcclOperation>(family_, NcclOperation::Parts{.flight = std::move(flight)}));
}

Pending NcclCommunicator::fence() {
  auto flight =
      this->flight(Request::collective(header(Channel::collective, "fence", collectives_count_, {})), {}, {});
  family_->check(flight->whole);
  flight->begin = flight->end = family_->record(flight->caller, flight->whole, /*timed=*/true);
  return Pending(std::make_shared<NcclOperation>(family_, NcclOperation::Parts{.flight = std::move(flight)}));
}

// Where the caller knows what comes, the device begins at once. Sizes may be others every time, so that there is
// nothing to agree about beforehand: what peers say is compared while it runs.
Pending NcclCommunicator::exchange(const char* operation, Tensors outgoing, const std::optional<Signature>& expected) {
  check_exchange(*this, operation, outgoing, expected);
  const auto me = static_cast<std::size_t>(rank());
  const auto ranks = static_cast<std::size_t>(size());
  Tensors sources = travelling(operation, outgoing, device());
  const Header head = next_collective(operation, {});
  Headers headers(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    if (r == me) continue;
    Header from = head;
    if (expected) from.signature = {(*expected)[r]};
    headers[r] = family_->transport().receive(world_rank(static_cast<int>(r)), std::move(from), !expected);
  }
  for (std::size_t i = 1; i < ranks; ++i) {
    const std::size_t r = (me + i) % ranks;
    Header own = head;
    own.signature = signature_of({outgoing[r]});
    announce(static_cast<int>(r), std::move(own));
  }
  const auto signature = [headers, me, own = signature_of({outgoing[me]})](std::size_t r) -> const Signature& {
    if (r == me) return own;
    return headers[r]->any_signature ? headers[r]->message.header.signature : headers[r]->header.signature;
  };
  std::erase(headers, nullptr);
  auto flight = this->flight(Request::collective(head), std::move(headers), collectives_);
  flight->sources = std::move(sources);
  flight->waits_for_headers = flight->waits_briefly = !expected;
  // What stays here is copied by the caller's stream.
  flight->prepare = [device = &family_->device(), signature, me, ranks](Flight& self) {
    for (std::size_t r = 0; r < ranks; ++r)
      self.targets.push_back(allocate(*device, signature(r), self.caller).front());
    if (!empty(self.targets[me])) device->copy(self.targets[me], self.sources[me], self.caller);
  };
  if (ranks > 1)
    flight->issue = [me, ranks](const Flight& self, NcclApi& nccl, NcclLine line) {
      in_groups(nccl, ranks, [&](std::size_t i) {
        const std::size_t to = (me + i) % ranks;
        const std::size_t from = (me + ranks - i) % ranks;
        if (i == 0) return;
        const at::Tensor& out = self.sources[to];
        const at::Tensor& in = self.targets[from];
        if (!empty(out)) nccl.send(out.const_data_ptr(), out.nbytes(), static_cast<int>(to), line.comm, line.stream);
        if (!empty(in))
          nccl.receive(in.mutable_data_ptr(), in.nbytes(), static_cast<int>(from), line.comm, line.stream);
      });
    };
  Watch watched(outgoing);
  auto finish = [signature](Flight& self) {
    Tensors result = std::move(self.targets);
    for (std::size_t r = 0; r < result.size(); ++r) result[r] = described({result[r]}, signature(r)).front();
    return result;
  };
  return Pending(std::make_shared<NcclOperation>(family_, NcclOperation::Parts{.queue = collective_queue_,
                                                                               .flight = std::move(flight),
                                                                               .watched = std::move(watched),
                                                                               .finish = std::move(finish)}));
}

void NcclCommunicator::abort(const std::string& reason) noexcept {
  family_->transport().abort(family_->transport().rank(), reason);
}

}  // namespace dualpipe::detail
