#pragma once

#include "dualpipe/train/mesh.hpp"

#include <cstdint>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"

namespace dualpipe {

void MeshShape::check(int num_ranks) const {
  DUALPIPE_CHECK(pipeline >= 1 && data >= 1 && expert >= 1, "a mesh has at least one rank along each dimension, got ",
                 "pipeline ", pipeline, ", data ", data, ", expert ", expert);
  DUALPIPE_CHECK(data % expert == 0, "expert groups lie inside data groups, but expert ", expert,
                 " does not divide data ", data, "; give a divisor of ", data, ", or another number of replicas");
  const std::int64_t wanted = std::int64_t{pipeline} * data;
  DUALPIPE_CHECK(wanted == num_ranks, "a mesh of pipeline ", pipeline, " x data ", data, " has ", wanted,
                 " ranks, but the world has ", num_ranks, "; start ", wanted, " ranks, or give sizes that multiply to ",
                 num_ranks, " (expert groups are a part of the data groups)");
}

Mesh::Mesh(std::shared_ptr<Communicator> world, const MeshShape& shape) : shape_(shape), world_(std::move(world)) {
  DUALPIPE_CHECK(world_ != nullptr, "Mesh needs a communicator");
  Communicator& all = *world_;
  detail::agree_that_fine(all, detail::finding_of([&] { shape_.check(all.size()); }));
  detail::agree_on(all, "mesh",
                   detail::str("pipeline ", shape_.pipeline, ", data ", shape_.data, ", expert ", shape_.expert,
                               shape_.order == MeshOrder::data_fastest ? ", data" : ", pipeline", " fastest"));
  const int place = shape_.place_of(all.rank()), replica = shape_.replica_of(all.rank());
  const auto& [pipeline, data, expert, order] = shape_;
  // Every rank goes through the same splits. A group that would be another one again is that one.
  std::shared_ptr<Communicator> alone;
  if (expert == 1 || expert == data) alone = all.split(all.rank(), 0);
  pipeline_ = data == 1 ? world_ : all.split_for({.exchanges = false}, replica, place);
  data_ = data == 1 ? alone : pipeline == 1 ? world_ : all.split(place, replica);
  const bool whole = expert == data, none = expert == 1;
  expert_ = none ? alone : whole ? data_ : all.split(place * (data / expert) + replica / expert, replica);
  expert_replicas_ = none ? data_ : whole ? alone : all.split(place * expert + replica % expert, replica);
}

}  // namespace dualpipe
