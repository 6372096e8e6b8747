// How an NcclCommunicator comes to be: its lines, their first use, and parts of it.
#include <set>
#include <utility>

#include "nccl/communicator.hpp"

namespace dualpipe::detail {
namespace {

/// A failure of NCCL or the device in a collective call ends it on all ranks.
template <class Body>
auto or_abort(Transport& transport, const char* operation, const Body& body) {
  try {
    return body();
  } catch (const DeviceFailure& error) {
    const std::string message = str("rank ", transport.rank(), ": ", operation, ": ", error.what());
    transport.abort(transport.rank(), message);
    throw CommError(transport.rank(), operation, message);
  }
}

}  // namespace

std::shared_ptr<NcclCommunicator> NcclCommunicator::world(const std::shared_ptr<Communicator>& control,
                                                          std::shared_ptr<DeviceApi> device,
                                                          std::shared_ptr<NcclApi> nccl, const NcclUse& use) {
  const auto mesh = std::dynamic_pointer_cast<MessageCommunicator>(control);
  DUALPIPE_CHECK(mesh != nullptr && mesh->group() == 0,
                 "the control plane of an NCCL communicator is a local or socket communicator of the whole world");
  auto family =
      std::make_shared<NcclFamily>(mesh->transport(), std::move(device), std::move(nccl), use.timeout, use.config);
  return std::make_shared<NcclCommunicator>(std::move(family), mesh->group(), mesh->members(), mesh->rank(),
                                            use.communicator_per_edge);
}

// The control plane's lanes have a group of their own, so that what it says does not mix with announcements.
NcclCommunicator::NcclCommunicator(std::shared_ptr<NcclFamily> family, std::int64_t group,
                                   const std::vector<int>& members, int rank, bool communicator_per_edge)
    : Communicator(rank, static_cast<int>(members.size())),
      family_(std::move(family)),
      trace_(family_),
      group_(group),
      communicator_per_edge_(communicator_per_edge),
      control_(family_->shared_fabric(), -1 - group, members, rank, at::kCPU),
      sends_(members.size(), 0),
      receives_(members.size(), 0),
      transfer_queue_(family_->add_queue()),
      collective_queue_(family_->add_queue()) {
  or_abort(family_->transport(), "connect", [&] {
    transfers_ = family_->open(control_, str(" transfers ", group_));
    collectives_ = family_->open(control_, str(" collectives ", group_));
    warm_up_collectives();
  });
}

void NcclCommunicator::connect(const std::vector<Edge>& edges) {
  control_.connect(edges);
  const std::set<Edge> sorted(edges.begin(), edges.end());
  or_abort(family_->transport(), "connect", [&] {
    // In one order on all ranks, so that the first of those that are not open yet always can be.
    for (const Edge& edge : sorted) {
      if (!communicator_per_edge_ || edges_.contains(edge) || (edge.from != rank() && edge.to != rank())) continue;
      const std::int64_t world = family_->transport().size();
      const std::int64_t group = -(std::int64_t{1} << 40) - (group_ * world + edge.from) * world - edge.to;
      MessageCommunicator both(family_->shared_fabric(), group, {world_rank(edge.from), world_rank(edge.to)},
                               edge.from == rank() ? 0 : 1, at::kCPU);
      edges_[edge] = family_->open(both, str(" edge ", edge.from, "->", edge.to, " of ", group_));
    }
    warm_up({sorted.begin(), sorted.end()});
  });
}

// NCCL connects on first use, and blocks the host meanwhile.
void NcclCommunicator::first_use(NcclLine line, NcclFamily::QueueId queue,
                                 std::function<void(const Flight&, NcclApi&, NcclLine)> issue) {
  auto flight =
      this->flight(Request::collective(header(Channel::collective, "connect", collectives_count_, {})), {}, line);
  flight->waits_for_headers = false;
  for (int i = 0; i < 2 * size(); ++i)
    flight->targets.push_back(family_->device().empty({1}, at::kFloat, flight->caller));
  flight->ready = family_->record(flight->caller, flight->whole);
  flight->issue = std::move(issue);
  family_->submit(queue, flight);
  family_->await_launch(queue, *flight);
  family_->watch(flight);
  family_->synchronize(*flight);
}

void NcclCommunicator::warm_up(const std::vector<Edge>& edges) {
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
    first_use(edges_.at(edge), transfer_queue_, [&](const Flight& self, NcclApi& nccl, NcclLine line) {
      in_groups(nccl, 1, [&](std::size_t) { touch(self, rank(), edge, 0, 1, nccl, line); });
    });
  }
  if (!shared.empty())
    first_use(transfers_, transfer_queue_, [&](const Flight& self, NcclApi& nccl, NcclLine line) {
      in_groups(nccl, shared.size(),
                [&](std::size_t i) { touch(self, rank(), shared[i], shared[i].from, shared[i].to, nccl, line); });
    });
}

void NcclCommunicator::warm_up_collectives() {
  first_use(collectives_, collective_queue_, [](const Flight& self, NcclApi& nccl, NcclLine line) {
    in_groups(nccl, 1, [&](std::size_t) {
      nccl.all_reduce(self.targets[0].mutable_data_ptr(), 1, at::kFloat, Reduce::sum, line.comm, line.stream);
    });
  });
}

std::shared_ptr<Communicator> NcclCommunicator::split(int color, int key) {
  const auto part = control_.split(color, key);
  if (part == nullptr) return nullptr;
  const auto& mesh = static_cast<const MessageCommunicator&>(*part);
  return std::make_shared<NcclCommunicator>(family_, mesh.group(), mesh.members(), mesh.rank(), communicator_per_edge_);
}

}  // namespace dualpipe::detail
