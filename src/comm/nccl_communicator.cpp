#include "comm/nccl_communicator.hpp"

#include <ATen/ATen.h>

#include <utility>

#include "comm/nccl_operation.hpp"
#include "comm/nccl_tensors.hpp"

namespace dualpipe::detail {
namespace {

using Headers = std::vector<std::shared_ptr<Transfer>>;

const char* name(Reduce reduce) {
  switch (reduce) {
    case Reduce::sum:
      return "all_reduce(sum)";
    case Reduce::max:
      return "all_reduce(max)";
    case Reduce::min:
      return "all_reduce(min)";
  }
  return "all_reduce";
}

/// In-place collectives write into the caller's tensors, whose requires_grad is the caller's own affair.
Signature signature_of_values(const Tensors& tensors) {
  Signature signature = signature_of(tensors);
  for (TensorSignature& tensor : signature) tensor.requires_grad = false;
  return signature;
}

}  // namespace

std::size_t NcclCommunicator::peer_index(const char* operation, int peer) const {
  DUALPIPE_CHECK(peer >= 0 && peer < size(), operation, ": there is no rank ", peer, " in this communicator of ",
                 size(), " ranks");
  DUALPIPE_CHECK(peer != rank(), operation, ": peer ", peer, " is this rank itself; keep the tensors instead");
  return static_cast<std::size_t>(peer);
}

Header NcclCommunicator::header(Channel channel, std::string operation, std::uint64_t sequence,
                                Signature signature) const {
  return {.group = group_,
          .channel = channel,
          .epoch = family_->fabric().epoch(),
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
  family_->fabric().send(world_rank(peer), {std::move(header), Parcel::of({}), {}});
}

Headers NcclCommunicator::announce_to_all(const Header& own, const std::vector<Header>& expected, bool any_signature) {
  Headers headers;
  for (int r = 0; r < size(); ++r)
    headers.push_back(
        r == rank() ? nullptr
                    : family_->fabric().receive(world_rank(r), expected[static_cast<std::size_t>(r)], any_signature));
  for (int i = 1; i < size(); ++i) announce((rank() + i) % size(), own);  // not all to rank 0 first
  std::erase(headers, nullptr);
  return headers;
}

Headers NcclCommunicator::announce_to_all(const Header& head, bool any_signature) {
  return announce_to_all(head, std::vector<Header>(static_cast<std::size_t>(size()), head), any_signature);
}

std::shared_ptr<Flight> NcclCommunicator::flight(Transfer whole, Headers headers, NcclLine line) const {
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
  const std::size_t index = peer_index("send", peer);
  Tensors sources = travelling("send", tensors, device());
  const Edge edge{rank(), peer};
  Transfer whole;
  whole.kind = Transfer::Kind::send;
  whole.peer = world_rank(peer);
  whole.header = header(Channel::transfer, "send", sends_[index], signature_of(tensors));

  auto flight = this->flight(whole, {}, transfer_line(edge));
  flight->waits_for_headers = false;
  flight->origin = whole.peer;
  flight->sources = std::move(sources);
  flight->ready = family_->record(flight->caller);
  flight->issue = [there = edges_.contains(edge) ? 1 : peer](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.sources.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.sources[i];
      if (!empty(tensor)) nccl.send(tensor.const_data_ptr(), tensor.nbytes(), there, line.comm, line.stream);
    });
  };
  announce(peer, whole.header);
  ++sends_[index];
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{transfer_queue_, std::move(flight), Watch(tensors), nullptr, {}, nullptr}));
}

Pending NcclCommunicator::receive(int peer, const std::optional<Signature>& expected) {
  const std::size_t index = peer_index("receive", peer);
  const Edge edge{peer, rank()};
  Header head = header(Channel::transfer, "send", receives_[index]++, expected.value_or(Signature()));
  Transfer whole;
  whole.kind = Transfer::Kind::receive;
  whole.peer = world_rank(peer);
  whole.header = head;
  std::shared_ptr<Transfer> announced = family_->fabric().receive(whole.peer, std::move(head), !expected);

  auto flight = this->flight(whole, {announced}, transfer_line(edge));
  std::string agreement = expected ? str("receive ", peer, " ", to_string(*expected)) : "";
  flight->waits_for_headers = !expected || !agreed_->contains(agreement);
  flight->origin = whole.peer;
  const auto signature = [announced, expected]() -> const Signature& {
    return expected ? *expected : announced->message.header.signature;
  };
  flight->prepare = [device = &family_->device(), signature](Flight& self) {
    self.targets = allocate(*device, signature(), self.caller);
  };
  flight->issue = [there = edges_.contains(edge) ? 0 : peer](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (!empty(tensor)) nccl.receive(tensor.mutable_data_ptr(), tensor.nbytes(), there, line.comm, line.stream);
    });
  };
  auto finish = [signature](Flight& self) { return described(std::move(self.targets), signature()); };
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{transfer_queue_, std::move(flight), Watch(), expected ? agreed_ : nullptr,
                                    std::move(agreement), std::move(finish)}));
}

Pending NcclCommunicator::all_reduce(Tensors tensors, Reduce reduce) {
  for (const at::Tensor& tensor : tensors) {
    DUALPIPE_CHECK(reduce == Reduce::sum || !tensor.defined() || !tensor.is_complex(), name(reduce),
                   ": complex numbers have no order; only sum takes them");
  }
  std::vector<Place> in_place = places(name(reduce), tensors, device(), /*as_bytes=*/false);
  const Header head = next_collective(name(reduce), signature_of_values(tensors));
  auto flight = this->flight(Transfer::collective(head), announce_to_all(head, false), collectives_);
  std::string agreement = head.operation + to_string(head.signature);
  flight->waits_for_headers = !agreed_->contains(agreement);
  flight->targets = memory_of(in_place);
  flight->ready = family_->record(flight->caller);
  flight->issue = [reduce](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (empty(tensor)) return;
      nccl.all_reduce(tensor.mutable_data_ptr(), static_cast<std::size_t>(tensor.numel()), tensor.scalar_type(), reduce,
                      line.comm, line.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place)](Flight&) mutable {
    for (Place& place : in_place) place.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{collective_queue_, std::move(flight), std::move(watched), agreed_,
                                    std::move(agreement), std::move(finish)}));
}

// Those that have nothing to give announce nothing, so that ranks that disagree about the root learn it.
Pending NcclCommunicator::broadcast(Tensors tensors, int root) {
  DUALPIPE_CHECK(root >= 0 && root < size(), "broadcast: there is no rank ", root, " in this communicator of ", size(),
                 " ranks");
  std::vector<Place> in_place = places("broadcast", tensors, device(), /*as_bytes=*/true);
  const Signature signature = signature_of_values(tensors);
  Header own = next_collective(str("broadcast from rank ", world_rank(root)), {});
  std::vector<Header> expected(static_cast<std::size_t>(size()), own);
  expected[static_cast<std::size_t>(root)].signature = signature;
  if (root == rank()) own.signature = signature;

  auto flight = this->flight(Transfer::collective(own), announce_to_all(own, expected, false), collectives_);
  std::string agreement = own.operation + to_string(signature);
  flight->waits_for_headers = !agreed_->contains(agreement);
  flight->targets = memory_of(in_place);
  flight->ready = family_->record(flight->caller);
  flight->issue = [root](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (!empty(tensor)) nccl.broadcast(tensor.mutable_data_ptr(), tensor.nbytes(), root, line.comm, line.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place),
                 receives = root != rank()](Flight&) mutable {
    for (Place& place : in_place)
      if (receives) place.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{collective_queue_, std::move(flight), std::move(watched), agreed_,
                                    std::move(agreement), std::move(finish)}));
}

Pending NcclCommunicator::all_gather(at::Tensor tensor) {
  return exchange("all_gather", Tensors(static_cast<std::size_t>(size()), tensor));
}

Pending NcclCommunicator::all_to_all(Tensors tensors) {
  DUALPIPE_CHECK(static_cast<int>(tensors.size()) == size(), "all_to_all: needs one tensor for each of the ", size(),
                 " ranks, got ", tensors.size(), "; give an empty one to a rank that gets nothing");
  return exchange("all_to_all", std::move(tensors));
}

Pending NcclCommunicator::barrier() {
  const Header head = next_collective("barrier", {});
  auto flight = this->flight(Transfer::collective(head), announce_to_all(head, false), {});
  return Pending(std::make_shared<NcclOperation>(
      family_, NcclOperation::Parts{std::nullopt, std::move(flight), Watch(), nullptr, {}, nullptr}));
}

Pending NcclCommunicator::exchange(const char* operation, Tensors outgoing) {
  const auto me = static_cast<std::size_t>(rank());
  const auto ranks = static_cast<std::size_t>(size());
  Tensors sources = travelling(operation, outgoing, device());
  const Header head = next_collective(operation, {});
  Headers headers(ranks);
  for (std::size_t r = 0; r < ranks; ++r)
    if (r != me) headers[r] = family_->fabric().receive(world_rank(static_cast<int>(r)), head, true);
  for (std::size_t i = 1; i < ranks; ++i) {
    const std::size_t r = (me + i) % ranks;
    Header own = head;
    own.signature = signature_of({outgoing[r]});
    announce(static_cast<int>(r), std::move(own));
  }
  Headers others = headers;
  std::erase(others, nullptr);
  auto flight = this->flight(Transfer::collective(head), std::move(others), collectives_);
  flight->sources = std::move(sources);
  flight->waits_briefly = true;
  flight->prepare = [device = &family_->device(), headers, me](Flight& self) {
    for (std::size_t r = 0; r < headers.size(); ++r)
      self.targets.push_back(r == me ? at::Tensor()
                                     : allocate(*device, headers[r]->message.header.signature, self.caller).front());
  };
  flight->issue = [me, ranks](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, ranks, [&](std::size_t i) {
      const std::size_t to = (me + i) % ranks;
      const std::size_t from = (me + ranks - i) % ranks;
      if (i == 0) return;
      const at::Tensor& out = self.sources[to];
      const at::Tensor& in = self.targets[from];
      if (!empty(out)) nccl.send(out.const_data_ptr(), out.nbytes(), static_cast<int>(to), line.comm, line.stream);
      if (!empty(in)) nccl.receive(in.mutable_data_ptr(), in.nbytes(), static_cast<int>(from), line.comm, line.stream);
    });
  };
  Watch watched(outgoing);
  auto finish = [device = &family_->device(), headers, me, own = signature_of({outgoing[me]})](Flight& self) {
    const PlainTensors plain;
    Tensors result = std::move(self.targets);
    result[me] = allocate(*device, own, self.caller).front();
    if (!empty(result[me])) device->copy(result[me], self.sources[me], device->current_stream());
    for (std::size_t r = 0; r < result.size(); ++r)
      result[r] = described({result[r]}, r == me ? own : headers[r]->message.header.signature).front();
    return result;
  };
  return Pending(std::make_shared<NcclOperation>(
      family_,
      NcclOperation::Parts{collective_queue_, std::move(flight), std::move(watched), nullptr, {}, std::move(finish)}));
}

void NcclCommunicator::abort(const std::string& reason) noexcept {
  family_->fabric().abort(family_->fabric().rank(), reason);
}

}  // namespace dualpipe::detail
