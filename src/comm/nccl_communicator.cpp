#include "comm/nccl_communicator.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <set>
#include <utility>

#include "comm/nccl_operation.hpp"

namespace dualpipe::detail {
namespace {

/// Calls of NCCL in one group. Larger ones can hang.
constexpr std::size_t kLargestGroup = 64;

using Headers = std::vector<std::shared_ptr<Transfer>>;

/// `count` calls, as many at a time as one group may have.
template <class Call>
void in_groups(NcclApi& nccl, std::size_t count, const Call& call) {
  for (std::size_t begin = 0; begin < count; begin += kLargestGroup) {
    nccl.group_start();
    try {
      for (std::size_t i = begin; i < std::min(count, begin + kLargestGroup); ++i) call(i);
    } catch (...) {
      try {
        nccl.group_end();
      } catch (...) {
        // The first error says more.
      }
      throw;
    }
    nccl.group_end();
  }
}

bool empty(const at::Tensor& tensor) { return !tensor.defined() || tensor.numel() == 0; }

void check_dense(const char* operation, const at::Tensor& tensor, std::size_t index, at::Device device) {
  DUALPIPE_CHECK(tensor.device() == device, operation, ": tensor ", index, " is on ", tensor.device(),
                 ", this communicator moves tensors of ", device, "; give it .to(communicator.device())");
  DUALPIPE_CHECK(tensor.layout() == at::kStrided && !tensor.is_quantized() && !tensor.is_nested(), operation,
                 ": tensor ", index, " has layout ", tensor.layout(), " and type ", tensor.toString(),
                 "; only dense tensors travel: use to_dense() or dequantize()");
}

bool as_it_is(const at::Tensor& tensor) { return !tensor.is_conj() && !tensor.is_neg() && tensor.is_contiguous(); }

/// Aliases of the tensors where possible, else copies made on the current stream; contiguous and outside autograd.
Tensors travelling(const char* operation, const Tensors& tensors, at::Device device) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) check_dense(operation, tensors[i], i, device);
  const PlainTensors plain;
  Tensors result;
  result.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    if (!tensor.defined()) {
      result.emplace_back();
    } else if (tensor.is_inference()) {
      result.push_back(tensor.resolve_conj().resolve_neg().clone(at::MemoryFormat::Contiguous));
    } else if (as_it_is(tensor)) {
      result.push_back(tensor.variable_data());
    } else {
      result.push_back(tensor.resolve_conj().resolve_neg().contiguous().variable_data());
    }
  }
  return result;
}

/// What NCCL adds up in place of `dtype`, which it does not know.
at::ScalarType added_up_as(at::ScalarType dtype) {
  switch (dtype) {
    case at::kByte:
    case at::kChar:
    case at::kInt:
    case at::kLong:
    case at::kHalf:
    case at::kBFloat16:
    case at::kFloat:
    case at::kDouble:
      return dtype;
    default:
      return at::isIntegralType(dtype, /*includeBool=*/true) ? at::kInt : at::kFloat;
  }
}

/// Where an in-place collective works: the tensor's own memory where it can be used as it is, else a copy.
class Place {
 public:
  Place(at::Tensor tensor, bool as_bytes) : tensor_(std::move(tensor)) {
    if (!tensor_.defined()) return;
    const at::Tensor plain = tensor_.detach();
    const bool direct =
        as_it_is(plain) && (as_bytes || plain.is_complex() || added_up_as(plain.scalar_type()) == plain.scalar_type());
    copied_ = !direct;
    memory_ = direct                           ? plain
              : as_bytes || plain.is_complex() ? plain.resolve_conj().resolve_neg().contiguous()
                                               : plain.to(added_up_as(plain.scalar_type())).contiguous();
    if (!as_bytes && memory_.is_complex()) memory_ = at::view_as_real(memory_);
  }
  const at::Tensor& memory() const { return memory_; }
  /// On the stream that has waited.
  void finish() {
    if (!tensor_.defined()) return;
    if (!copied_) {
      if (!tensor_.is_inference()) tensor_.unsafeGetTensorImpl()->bump_version();
    } else {
      tensor_.copy_(tensor_.is_complex() && !memory_.is_complex() ? at::view_as_complex(memory_) : memory_);
    }
  }

 private:
  at::Tensor tensor_, memory_;
  bool copied_ = false;
};

std::vector<Place> places(const char* operation, const Tensors& tensors, at::Device device, bool as_bytes) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) check_dense(operation, tensors[i], i, device);
  const PlainTensors plain;
  std::vector<Place> result;
  for (const at::Tensor& tensor : tensors) result.emplace_back(tensor, as_bytes);
  return result;
}

Tensors memory_of(const std::vector<Place>& places) {
  Tensors memory;
  for (const Place& place : places) memory.push_back(place.memory());
  return memory;
}

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

Tensors allocate(DeviceApi& device, const Signature& signature, DeviceStream stream) {
  Tensors tensors;
  tensors.reserve(signature.size());
  for (const TensorSignature& tensor : signature)
    tensors.push_back(tensor.defined ? device.empty(tensor.sizes, tensor.dtype, stream) : at::Tensor());
  return tensors;
}

/// Gives tensors as their sender described them.
Tensors described(Tensors tensors, const Signature& signature) {
  for (std::size_t i = 0; i < tensors.size(); ++i)
    if (tensors[i].defined()) tensors[i].set_requires_grad(signature[i].requires_grad);
  return tensors;
}

Transfer collective(const Header& header) {
  Transfer whole;
  whole.kind = Transfer::Kind::receive;
  whole.header = header;
  return whole;
}

/// A failure of NCCL or the device in a collective call ends it on all ranks.
template <class Body>
auto or_abort(Fabric& fabric, const char* operation, const Body& body) {
  try {
    return body();
  } catch (const DeviceFailure& error) {
    const std::string message = str("rank ", fabric.rank(), ": ", operation, ": ", error.what());
    fabric.abort(fabric.rank(), message);
    throw CommError(fabric.rank(), operation, message);
  }
}

}  // namespace

std::shared_ptr<NcclCommunicator> NcclCommunicator::world(const std::shared_ptr<Communicator>& control,
                                                          std::shared_ptr<DeviceApi> device,
                                                          std::shared_ptr<NcclApi> nccl, const NcclUse& use) {
  const auto mesh = std::dynamic_pointer_cast<MeshCommunicator>(control);
  DUALPIPE_CHECK(mesh != nullptr && mesh->group() == 0,
                 "the control plane of an NCCL communicator is a local or socket communicator of the whole world");
  auto family =
      std::make_shared<NcclFamily>(mesh->fabric(), std::move(device), std::move(nccl), use.timeout, use.config);
  return std::make_shared<NcclCommunicator>(std::move(family), mesh->group(), mesh->members(), mesh->rank(),
                                            use.communicator_per_edge);
}

// The control plane's lanes have a group of their own, so that what it says does not mix with announcements.
NcclCommunicator::NcclCommunicator(std::shared_ptr<NcclFamily> family, std::int64_t group,
                                   const std::vector<int>& members, int rank, bool communicator_per_edge)
    : Communicator(rank, static_cast<int>(members.size())),
      family_(std::move(family)),
      group_(group),
      communicator_per_edge_(communicator_per_edge),
      control_(family_->shared_fabric(), -1 - group, members, rank),
      sends_(members.size(), 0),
      receives_(members.size(), 0),
      transfer_queue_(family_->add_queue()),
      collective_queue_(family_->add_queue()) {
  or_abort(family_->fabric(), "connect", [&] {
    transfers_ = family_->open(control_, str(" transfers ", group_));
    collectives_ = family_->open(control_, str(" collectives ", group_));
  });
}

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
  auto flight = this->flight(collective(head), announce_to_all(head, false), collectives_);
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

  auto flight = this->flight(collective(own), announce_to_all(own, expected, false), collectives_);
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
  auto flight = this->flight(collective(head), announce_to_all(head, false), {});
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
  auto flight = this->flight(collective(head), std::move(others), collectives_);
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

void NcclCommunicator::connect(const std::vector<Edge>& edges) {
  control_.connect(edges);
  const std::set<Edge> sorted(edges.begin(), edges.end());
  or_abort(family_->fabric(), "connect", [&] {
    // In one order on all ranks, so that the first of those that are not open yet always can be.
    for (const Edge& edge : sorted) {
      if (!communicator_per_edge_ || edges_.contains(edge) || (edge.from != rank() && edge.to != rank())) continue;
      const std::int64_t world = family_->fabric().size();
      const std::int64_t group = -(std::int64_t{1} << 40) - (group_ * world + edge.from) * world - edge.to;
      MeshCommunicator both(family_->shared_fabric(), group, {world_rank(edge.from), world_rank(edge.to)},
                            edge.from == rank() ? 0 : 1);
      edges_[edge] = family_->open(both, str(" edge ", edge.from, "->", edge.to, " of ", group_));
    }
    warm_up({sorted.begin(), sorted.end()});
  });
}

// NCCL connects on first use, and blocks the host meanwhile.
void NcclCommunicator::warm_up(const std::vector<Edge>& edges) {
  const auto run = [this](NcclLine line, NcclFamily::QueueId queue,
                          std::function<void(const Flight&, NcclApi&, NcclLine)> issue) {
    auto flight = this->flight(collective(header(Channel::collective, "connect", collectives_count_, {})), {}, line);
    flight->waits_for_headers = false;
    for (int i = 0; i < 2 * size(); ++i)
      flight->targets.push_back(family_->device().empty({1}, at::kFloat, flight->caller));
    flight->ready = family_->record(flight->caller);
    flight->issue = std::move(issue);
    family_->submit(queue, flight);
    family_->await_launch(queue, *flight);
    family_->await_on_host(flight);
  };
  const auto touch = [](const Flight& self, int me, Edge edge, int from, int to, NcclApi& nccl, NcclLine line) {
    void* memory = self.targets[static_cast<std::size_t>(edge.from == me ? edge.to : edge.from)].mutable_data_ptr();
    if (edge.from == me) nccl.send(memory, 1, to, line.comm, line.stream);
    if (edge.to == me) {
      memory = self.targets[self.targets.size() / 2 + static_cast<std::size_t>(edge.from)].mutable_data_ptr();
      nccl.receive(memory, 1, from, line.comm, line.stream);
    }
  };
  std::vector<Edge> shared;
  for (const Edge& edge : edges) {
    if (edge.from != rank() && edge.to != rank()) continue;
    if (!edges_.contains(edge)) {
      shared.push_back(edge);
      continue;
    }
    run(edges_.at(edge), transfer_queue_, [&](const Flight& self, NcclApi& nccl, NcclLine line) {
      in_groups(nccl, 1, [&](std::size_t) { touch(self, rank(), edge, 0, 1, nccl, line); });
    });
  }
  if (!shared.empty())
    run(transfers_, transfer_queue_, [&](const Flight& self, NcclApi& nccl, NcclLine line) {
      in_groups(nccl, shared.size(),
                [&](std::size_t i) { touch(self, rank(), shared[i], shared[i].from, shared[i].to, nccl, line); });
    });
  run(collectives_, collective_queue_, [](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, 1, [&](std::size_t) {
      nccl.all_reduce(self.targets[0].mutable_data_ptr(), 1, at::kFloat, Reduce::sum, line.comm, line.stream);
    });
  });
}

std::shared_ptr<Communicator> NcclCommunicator::split(int color, int key) {
  const auto part = control_.split(color, key);
  if (part == nullptr) return nullptr;
  const auto& mesh = static_cast<const MeshCommunicator&>(*part);
  return std::make_shared<NcclCommunicator>(family_, mesh.group(), mesh.members(), mesh.rank(), communicator_per_edge_);
}

void NcclCommunicator::abort(const std::string& reason) noexcept {
  family_->fabric().abort(family_->fabric().rank(), reason);
}

}  // namespace dualpipe::detail
