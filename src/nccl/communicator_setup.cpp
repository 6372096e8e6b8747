// Construction of an NcclCommunicator, connect() and split(): opens NCCL's communicators and warms them up.
#include <algorithm>
#include <set>
#include <utility>

#include "nccl/communicator.hpp"

namespace dualpipe::detail {
namespace {

using Edge = Communicator::Edge;

/// Runs part of a collective call; a failure of NCCL or the device ends all ranks.
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

/// Edges in rounds: within one no rank has two, so that its communicators open side by side. The same order on all
/// ranks, so that the first edge that is not open yet can always open.
std::vector<Edge> in_rounds(const std::set<Edge>& edges) {
  std::vector<Edge> ordered;
  for (std::set<Edge> rest = edges; !rest.empty();) {
    std::set<int> busy;
    std::erase_if(rest, [&](const Edge& edge) {
      if (busy.contains(edge.from) || busy.contains(edge.to)) return false;
      busy.insert({edge.from, edge.to});
      ordered.push_back(edge);
      return true;
    });
  }
  return ordered;
}

}  // namespace

std::shared_ptr<NcclCommunicator> NcclCommunicator::world(const std::shared_ptr<Communicator>& control,
                                                          std::shared_ptr<DeviceApi> device,
                                                          std::shared_ptr<NcclApi> nccl,
                                                          const NcclCommunicatorOptions& options) {
  const auto messages = std::dynamic_pointer_cast<MessageCommunicator>(control);
  DUALPIPE_CHECK(messages != nullptr && messages->group() == 0,
                 "the control plane of an NCCL communicator is a local or socket communicator of the whole world");
  auto context = std::make_shared<NcclContext>(messages->transport(), std::move(device), std::move(nccl),
                                               options.timeout, options.name);
  return std::make_shared<NcclCommunicator>(std::move(context), messages->group(), messages->members(),
                                            messages->rank(), GroupUse{.exchanges = false}, options);
}

NcclCommunicator::NcclCommunicator(std::shared_ptr<NcclContext> context, std::int64_t group,
                                   const std::vector<int>& members, int rank, const GroupUse& use,
                                   NcclCommunicatorOptions options)
    : Communicator(rank, static_cast<int>(members.size())),
      context_(std::move(context)),
      trace_(context_),
      options_(std::move(options)),
      control_(context_->shared_transport(), -1 - group, members, rank, at::kCPU),
      headers_(group, context_->transport().epoch(), members.size(), /*tensors_follow=*/false),
      transfer_queue_(context_->add_queue()),
      collective_queue_(context_->add_queue()) {
  or_abort(context_->transport(), "connect", [&] {
    collectives_ = context_->open(control_, str(use.sums ? " sums " : " collectives ", headers_.group()),
                                  use.sums ? options_.sum_ctas : options_.collective_ctas);
    warm_up_collectives();
    if (use.exchanges && this->size() > 1) warm_up_exchanges();
  });
}

void NcclCommunicator::connect(const std::vector<Edge>& edges) {
  control_.connect(edges);
  const std::set<Edge> sorted(edges.begin(), edges.end());
  or_abort(context_->transport(), "connect", [&] {
    if (options_.communicator_per_edge) {
      for (const Edge& edge : in_rounds(sorted))
        if ((edge.from == rank() || edge.to == rank()) && !edges_.contains(edge)) open_edge(edge);
    } else if (!sorted.empty()) {
      if (!transfers_)
        transfers_ = context_->open(control_, str(" transfers ", headers_.group()), options_.transfer_ctas);
      warm_up_transfers({sorted.begin(), sorted.end()});
    }
    if (options_.start_when_both_ready) add_start_flags({sorted.begin(), sorted.end()});
  });
}

void NcclCommunicator::add_start_flags(const std::vector<Edge>& edges) {
  std::vector<Edge> own;
  std::vector<StartFlags::End> ends;
  for (const Edge& edge : edges) {
    const bool sends = edge.from == rank();
    if ((!sends && edge.to != rank()) || starts_.contains(edge)) continue;
    own.push_back(edge);
    ends.push_back({.peer = world_rank(sends ? edge.to : edge.from), .group = headers_.group(), .sends = sends});
  }
  const std::vector<StartFlags::End*> added = context_->start_flags().add(ends);
  for (std::size_t i = 0; i < own.size(); ++i) starts_[own[i]] = added[i];
}

void NcclCommunicator::open_edge(Edge edge) {
  const bool sends = edge.from == rank();
  const std::int64_t world = context_->transport().size();
  const std::int64_t group = -(std::int64_t{1} << 40) - (headers_.group() * world + edge.from) * world - edge.to;
  MessageCommunicator both(context_->shared_transport(), group, {world_rank(edge.from), world_rank(edge.to)},
                           sends ? 0 : 1, at::kCPU);
  const CommStream opened =
      context_->open(both, str(" edge ", edge.from, "->", edge.to, " of ", headers_.group()), options_.transfer_ctas);
  edges_[edge] = opened;
  warm_up(opened, transfer_queue_, 1, 1, [sends](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    void* memory = self.targets[0].mutable_data_ptr();
    in_groups(nccl, 1, [&](std::size_t) {
      if (sends) {
        nccl.send(memory, 1, 1, on.comm, on.stream);
      } else {
        nccl.receive(memory, 1, 0, on.comm, on.stream);
      }
    });
  });
}

// NCCL connects at the first use, which blocks the host and may allocate: it has to happen before a step.
void NcclCommunicator::warm_up(CommStream on, NcclContext::QueueId queue, std::size_t count, std::size_t bytes,
                               std::function<void(const NcclOperation&, NcclApi&, CommStream)> issue) {
  auto operation = make_operation(Request::collective(headers_.local("connect")), {}, on);
  operation->waits_for_headers = false;
  for (std::size_t i = 0; i < count; ++i)
    operation->targets.push_back(
        context_->device().empty({static_cast<std::int64_t>(bytes)}, at::kByte, operation->caller));
  operation->ready = context_->record(operation->caller, operation->request);
  operation->issue = std::move(issue);
  context_->submit(queue, operation);
  context_->await_launch(queue, *operation);
  context_->watch(operation);
  context_->synchronize(*operation);
}

void NcclCommunicator::warm_up_transfers(const std::vector<Edge>& edges) {
  std::vector<Edge> own;
  for (const Edge& edge : edges)
    if (edge.from == rank() || edge.to == rank()) own.push_back(edge);
  if (own.empty()) return;
  warm_up(*transfers_, transfer_queue_, own.size(), 1,
          [own, me = rank()](const NcclOperation& self, NcclApi& nccl, CommStream on) {
            in_groups(nccl, own.size(), [&](std::size_t i) {
              void* memory = self.targets[i].mutable_data_ptr();
              if (own[i].from == me) {
                nccl.send(memory, 1, own[i].to, on.comm, on.stream);
              } else {
                nccl.receive(memory, 1, own[i].from, on.comm, on.stream);
              }
            });
          });
}

// NCCL chooses an algorithm by kind and size of a collective, and connects each by itself.
void NcclCommunicator::warm_up_collectives() {
  constexpr std::size_t smallest = sizeof(float);
  constexpr std::size_t size_class = 256;  // ratio of the sizes that are tried
  for (std::size_t bytes = smallest; bytes <= options_.largest_warm_up_bytes; bytes *= size_class)
    for (const bool reduces : {true, false})
      warm_up(collectives_, collective_queue_, 1, bytes, [=](const NcclOperation& self, NcclApi& nccl, CommStream on) {
        void* memory = self.targets[0].mutable_data_ptr();
        in_groups(nccl, 1, [&](std::size_t) {
          if (reduces) {
            nccl.all_reduce(memory, bytes / sizeof(float), at::kFloat, Reduce::sum, on.comm, on.stream);
          } else {
            nccl.broadcast(memory, bytes, 0, on.comm, on.stream);
          }
        });
      });
}

// Each peer costs memory. The world is rarely a group of experts: there they connect at the first use.
void NcclCommunicator::warm_up_exchanges() {
  const std::size_t ranks = size();
  const std::size_t me = rank();
  warm_up(collectives_, collective_queue_, 2 * ranks, 1, [=](const NcclOperation& self, NcclApi& nccl, CommStream on) {
    in_groups(nccl, ranks - 1, [&](std::size_t i) {
      const std::size_t to = (me + i + 1) % ranks;
      const std::size_t from = (me + ranks - i - 1) % ranks;
      nccl.send(self.targets[to].const_data_ptr(), 1, static_cast<int>(to), on.comm, on.stream);
      nccl.receive(self.targets[ranks + from].mutable_data_ptr(), 1, static_cast<int>(from), on.comm, on.stream);
    });
  });
}

std::shared_ptr<Communicator> NcclCommunicator::split_for(const GroupUse& use, int color, int key) {
  const auto part = control_.split(color, key);
  if (part == nullptr) return nullptr;
  const auto& messages = static_cast<const MessageCommunicator&>(*part);
  return std::make_shared<NcclCommunicator>(context_, messages.group(), messages.members(), messages.rank(), use,
                                            options_);
}

}  // namespace dualpipe::detail
