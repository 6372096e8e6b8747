#include "nccl/communicator.hpp"

#include <ATen/ATen.h>

#include <utility>

#include "dualpipe/detail/comm/arguments.hpp"
#include "nccl/pending.hpp"
#include "nccl/tensors.hpp"

namespace dualpipe::detail {
namespace {

using Headers = std::vector<std::shared_ptr<Request>>;

}  // namespace

void NcclCommunicator::announce(int peer, Header header) {
  context_->transport().send(world_rank(peer), {std::move(header), MessageTensors::of({}), {}});
}

Headers NcclCommunicator::announce_to_all(const Header& own, const std::vector<Header>& expected) {
  Headers headers;
  for (int r = 0; r < size(); ++r)
    if (r != rank()) headers.push_back(context_->transport().receive(world_rank(r), expected[r], false));
  for (int i = 1; i < size(); ++i) announce((rank() + i) % size(), own);  // begins at another rank on each rank
  return headers;
}

Headers NcclCommunicator::announce_to_all(const Header& head) {
  return announce_to_all(head, std::vector<Header>(size(), head));
}

std::shared_ptr<NcclOperation> NcclCommunicator::make_operation(Request request, Headers headers, CommStream on) const {
  auto operation = std::make_shared<NcclOperation>();
  operation->request = std::move(request);
  operation->headers = std::move(headers);
  operation->comm_stream = on;
  operation->caller = context_->device().current_stream();
  operation->first_rank = world_rank(0);
  return operation;
}

// Without connect() there is no communicator for transfers: they share that of the collectives, and its queue, since
// the launches of one communicator must have one order on all ranks.
NcclCommunicator::Route NcclCommunicator::route(Edge edge, int peer) const {
  const auto found = starts_.find(edge);
  StartFlags::End* const start = found == starts_.end() ? nullptr : found->second;
  const auto own = edges_.find(edge);
  if (own != edges_.end()) return {own->second, transfer_queue_, edge.from == rank() ? 1 : 0, start};
  if (transfers_) return {*transfers_, transfer_queue_, peer, start};
  return {collectives_, collective_queue_, peer, nullptr};
}

Pending NcclCommunicator::send(int peer, Tensors tensors) {
  const std::size_t index = checked_peer(*this, "send", peer);
  check_sendable(tensors, device(), " of send");
  Tensors sources = sendable(tensors);
  const Route route = this->route({rank(), peer}, peer);
  Request request;
  request.kind = Request::Kind::send;
  request.peer = world_rank(peer);
  request.header = headers_.next_send(index, signature_of(tensors));

  auto operation = make_operation(request, {}, route.on);
  operation->waits_for_headers = false;
  operation->start = route.start;
  operation->blamed_rank = request.peer;
  operation->sources = std::move(sources);
  operation->ready = context_->record(operation->caller, operation->request);
  operation->issue = [there = route.peer](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    in_groups(nccl, self.sources.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.sources[i];
      if (has_elements(tensor)) nccl.send(tensor.const_data_ptr(), tensor.nbytes(), there, on.comm, on.stream);
    });
  };
  announce(peer, request.header);
  return Pending(std::make_shared<NcclPending>(
      context_,
      NcclPending::Parts{.queue = route.queue, .operation = std::move(operation), .watched = Watch(tensors)}));
}

Pending NcclCommunicator::receive(int peer, const std::optional<Expected>& expected) {
  const std::size_t index = checked_peer(*this, "receive", peer);
  const Route route = this->route({peer, rank()}, peer);
  Header head = headers_.next_receive(index, expected ? expected->signature : Signature());
  Request request;
  request.kind = Request::Kind::receive;
  request.peer = world_rank(peer);
  request.header = head;
  std::shared_ptr<Request> announced = context_->transport().receive(request.peer, std::move(head), !expected,
                                                                     expected ? expected->advice : std::string());
  const auto signature = [announced]() -> const Signature& {
    return announced->any_signature ? announced->message.header.signature : announced->header.signature;
  };
  // The first receive of a signature makes it known, whether or not it was expected.
  const auto key = [peer](const Signature& what) { return str("receive ", peer, " ", to_string(what)); };

  auto operation = make_operation(request, {announced}, route.on);
  operation->waits_for_headers = !expected || !known_->contains(key(expected->signature));
  operation->start = route.start;
  operation->blamed_rank = request.peer;
  operation->prepare = [device = &context_->device(), signature](NcclOperation& self) {
    self.targets = allocate(*device, signature(), self.caller);
  };
  operation->issue = [there = route.peer](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (has_elements(tensor)) nccl.receive(tensor.mutable_data_ptr(), tensor.nbytes(), there, on.comm, on.stream);
    });
  };
  auto finish = [signature, key, known = known_](NcclOperation& self) {
    if (self.waits_for_headers) known->insert(key(signature()));
    return as_described(std::move(self.targets), signature());
  };
  return Pending(std::make_shared<NcclPending>(
      context_,
      NcclPending::Parts{.queue = route.queue, .operation = std::move(operation), .finish = std::move(finish)}));
}

Pending NcclCommunicator::all_reduce(Tensors tensors, Reduce reduce) {
  check_reduce(tensors, reduce);
  std::vector<InPlaceBuffer> in_place = in_place_buffers(reduce_name(reduce), tensors, device(), /*as_bytes=*/false);
  const Header head = headers_.next_collective(reduce_name(reduce), signature_of_values(tensors));
  auto operation = make_operation(Request::collective(head), announce_to_all(head), collectives_);
  std::string key = head.operation + to_string(head.signature);
  operation->waits_for_headers = !known_->contains(key);
  operation->targets = memory_of(in_place);
  operation->ready = context_->record(operation->caller, operation->request);
  operation->issue = [reduce](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (!has_elements(tensor)) return;
      nccl.all_reduce(tensor.mutable_data_ptr(), tensor.numel(), tensor.scalar_type(), reduce, on.comm, on.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place), key = std::move(key),
                 known = known_](NcclOperation& self) mutable {
    if (self.waits_for_headers) known->insert(std::move(key));
    for (InPlaceBuffer& buffer : in_place) buffer.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclPending>(context_, NcclPending::Parts{.queue = collective_queue_,
                                                                            .operation = std::move(operation),
                                                                            .watched = std::move(watched),
                                                                            .finish = std::move(finish)}));
}

// Only the root announces a signature, so that ranks with different roots fail.
Pending NcclCommunicator::broadcast(Tensors tensors, int root) {
  const std::size_t source = checked_root(*this, root);
  std::vector<InPlaceBuffer> in_place = in_place_buffers("broadcast", tensors, device(), /*as_bytes=*/true);
  const Signature signature = signature_of_values(tensors);
  Header own = headers_.next_collective(str("broadcast from rank ", world_rank(root)), {});
  std::vector<Header> expected(size(), own);
  expected[source].signature = signature;
  if (root == rank()) own.signature = signature;

  auto operation = make_operation(Request::collective(own), announce_to_all(own, expected), collectives_);
  std::string key = own.operation + to_string(signature);
  operation->waits_for_headers = !known_->contains(key);
  operation->targets = memory_of(in_place);
  operation->ready = context_->record(operation->caller, operation->request);
  operation->issue = [root](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    in_groups(nccl, self.targets.size(), [&](std::size_t i) {
      const at::Tensor& tensor = self.targets[i];
      if (has_elements(tensor)) nccl.broadcast(tensor.mutable_data_ptr(), tensor.nbytes(), root, on.comm, on.stream);
    });
  };
  Watch watched(tensors);
  auto finish = [tensors = std::move(tensors), in_place = std::move(in_place), key = std::move(key), known = known_,
                 receives = root != rank()](NcclOperation& self) mutable {
    if (self.waits_for_headers) known->insert(std::move(key));
    for (InPlaceBuffer& buffer : in_place)
      if (receives) buffer.finish();
    return std::move(tensors);
  };
  return Pending(std::make_shared<NcclPending>(context_, NcclPending::Parts{.queue = collective_queue_,
                                                                            .operation = std::move(operation),
                                                                            .watched = std::move(watched),
                                                                            .finish = std::move(finish)}));
}

Pending NcclCommunicator::all_gather(at::Tensor tensor, const std::optional<Signature>& expected) {
  return exchange("all_gather", Tensors(size(), tensor), expected);
}

Pending NcclCommunicator::all_to_all(Tensors tensors, const std::optional<Signature>& expected) {
  return exchange("all_to_all", std::move(tensors), expected);
}

Pending NcclCommunicator::barrier() {
  const Header head = headers_.next_collective("barrier");
  auto operation = make_operation(Request::collective(head), announce_to_all(head), {});
  return Pending(std::make_shared<NcclPending>(context_, NcclPending::Parts{.operation = std::move(operation)}));
}

Pending NcclCommunicator::fence() {
  auto operation = make_operation(Request::collective(headers_.local("fence")), {}, {});
  context_->check(operation->request);
  operation->end = context_->record(operation->caller, operation->request);
  return Pending(std::make_shared<NcclPending>(context_, NcclPending::Parts{.operation = std::move(operation)}));
}

// If the caller knows the signatures, the launch does not wait for headers; they are compared while the device works.
// Sizes change from call to call, so that known_ does not apply.
Pending NcclCommunicator::exchange(const char* name, Tensors outgoing, const std::optional<Signature>& expected) {
  check_exchange(*this, name, outgoing, expected);
  const std::size_t me = rank();
  const std::size_t ranks = size();
  check_sendable(outgoing, device(), str(" of ", name));
  Tensors sources = sendable(outgoing);
  const Header head = headers_.next_collective(name, {});
  Headers headers(ranks);
  for (std::size_t r = 0; r < ranks; ++r) {
    if (r == me) continue;
    Header from = head;
    if (expected) from.signature = {(*expected)[r]};
    headers[r] = context_->transport().receive(world_rank(static_cast<int>(r)), std::move(from), !expected);
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
  auto operation = make_operation(Request::collective(head), std::move(headers), collectives_);
  operation->sources = std::move(sources);
  operation->waits_for_headers = operation->polls_for_headers = !expected;
  // The rank's own part is copied on the caller's stream.
  operation->prepare = [device = &context_->device(), signature, me, ranks](NcclOperation& self) {
    for (std::size_t r = 0; r < ranks; ++r)
      self.targets.push_back(allocate(*device, signature(r), self.caller).front());
    if (has_elements(self.targets[me])) device->copy(self.targets[me], self.sources[me], self.caller);
  };
  if (ranks > 1)
    operation->issue = [me, ranks](const NcclOperation& self, NcclApi& nccl, CommStream on) {
      in_groups(nccl, ranks, [&](std::size_t i) {
        const std::size_t to = (me + i) % ranks;
        const std::size_t from = (me + ranks - i) % ranks;
        if (i == 0) return;
        const at::Tensor& out = self.sources[to];
        const at::Tensor& in = self.targets[from];
        if (has_elements(out)) nccl.send(out.const_data_ptr(), out.nbytes(), static_cast<int>(to), on.comm, on.stream);
        if (has_elements(in))
          nccl.receive(in.mutable_data_ptr(), in.nbytes(), static_cast<int>(from), on.comm, on.stream);
      });
    };
  Watch watched(outgoing);
  auto finish = [signature](NcclOperation& self) {
    Tensors result = std::move(self.targets);
    for (std::size_t r = 0; r < result.size(); ++r) result[r] = as_described({result[r]}, signature(r)).front();
    return result;
  };
  return Pending(std::make_shared<NcclPending>(context_, NcclPending::Parts{.queue = collective_queue_,
                                                                            .operation = std::move(operation),
                                                                            .watched = std::move(watched),
                                                                            .finish = std::move(finish)}));
}

void NcclCommunicator::abort(const std::string& reason) noexcept {
  context_->transport().abort(context_->transport().rank(), reason);
}

}  // namespace dualpipe::detail
