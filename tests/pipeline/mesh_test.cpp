// The groups of a mesh: who is in them, in which order, and what does not fit.
#include "dualpipe/train/mesh.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/local.hpp"
#include "pipeline/network.hpp"
#include "pipeline/pipeline.hpp"

namespace dualpipe::test {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

/// Ranks of the world in a group, in its order, as its collectives see them.
std::vector<int> members(Communicator& group, const Communicator& world) {
  std::vector<int> ranks;
  for (const at::Tensor& each : group.all_gather(torch::full({1}, world.rank(), torch::kInt64)).take())
    ranks.push_back(static_cast<int>(each.item<std::int64_t>()));
  for (int rank = 0; rank < group.size(); ++rank) EXPECT_EQ(group.world_rank(rank), ranks[rank]);
  return ranks;
}

TEST(Mesh, DataGroupsAreNeighboursAndExpertGroupsLieInsideThem) {
  run_ranks(8, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 2, .data = 4, .expert = 2});
    const int rank = world->rank(), place = rank / 4, replica = rank % 4;
    EXPECT_EQ(mesh.replica(), replica);
    EXPECT_EQ(mesh.num_replicas(), 4);
    EXPECT_EQ(mesh.pipeline()->rank(), place);
    EXPECT_EQ(mesh.data()->rank(), replica);
    EXPECT_EQ(mesh.expert()->rank(), replica % 2);
    EXPECT_EQ(mesh.expert_replicas()->rank(), replica / 2);
    EXPECT_THAT(members(*mesh.pipeline(), *world), ElementsAre(replica, 4 + replica));
    EXPECT_THAT(members(*mesh.data(), *world), ElementsAre(4 * place, 4 * place + 1, 4 * place + 2, 4 * place + 3));
    const int first = rank / 2 * 2, alike = 4 * place + replica % 2;
    EXPECT_THAT(members(*mesh.expert(), *world), ElementsAre(first, first + 1));
    EXPECT_THAT(members(*mesh.expert_replicas(), *world), ElementsAre(alike, alike + 2));
  });
}

TEST(Mesh, PipelinesMayBeNeighboursInstead) {
  run_ranks(6, [](std::shared_ptr<Communicator> world) {
    const Mesh mesh(world, {.pipeline = 3, .data = 2, .order = MeshOrder::pipeline_fastest});
    const int rank = world->rank(), place = rank % 3, replica = rank / 3;
    EXPECT_EQ(mesh.replica(), replica);
    EXPECT_THAT(members(*mesh.pipeline(), *world), ElementsAre(3 * replica, 3 * replica + 1, 3 * replica + 2));
    EXPECT_THAT(members(*mesh.data(), *world), ElementsAre(place, 3 + place));
    EXPECT_THAT(members(*mesh.expert(), *world), ElementsAre(rank));
    EXPECT_THAT(members(*mesh.expert_replicas(), *world), ElementsAre(place, 3 + place));
  });
}

TEST(Mesh, RanksPlacesAndReplicasAreOneNumbering) {
  for (const MeshOrder order : {MeshOrder::data_fastest, MeshOrder::pipeline_fastest}) {
    const MeshShape shape{.pipeline = 3, .data = 4, .order = order};
    for (int rank = 0; rank < shape.size(); ++rank)
      EXPECT_EQ(shape.rank_of(shape.place_of(rank), shape.replica_of(rank)), rank);
  }
}

TEST(Mesh, OfOnePipelineOrOfOnePlace) {
  run_ranks(2, [](std::shared_ptr<Communicator> world) {
    const Mesh pipeline(world, {.pipeline = 2});
    EXPECT_EQ(pipeline.pipeline(), world);
    EXPECT_EQ(pipeline.data()->size(), 1);
    EXPECT_EQ(pipeline.expert()->size(), 1);
    EXPECT_EQ(pipeline.expert_replicas()->size(), 1);
    const Mesh data(world, {.data = 2, .expert = 2});
    EXPECT_EQ(data.pipeline()->size(), 1);
    EXPECT_EQ(data.data(), world);
    EXPECT_THAT(members(*data.expert(), *world), ElementsAre(0, 1));
    EXPECT_EQ(data.expert_replicas()->size(), 1);
  });
}

TEST(Mesh, OverANetworkOfOneOperationAtATime) {
  run_ranks(8, [](std::shared_ptr<Communicator> comm) {
    const auto world = over(Network::serial, comm);
    const Mesh mesh(world, {.pipeline = 2, .data = 4, .expert = 2});
    for (const auto& group : {mesh.pipeline(), mesh.data(), mesh.expert(), mesh.expert_replicas()}) {
      const at::Tensor ones = torch::ones({1});
      group->all_reduce({ones}).wait();
      EXPECT_EQ(ones.item<float>(), static_cast<float>(group->size()));
    }
  });
}

TEST(Mesh, WhatDoesNotFitTheWorldIsOneErrorOnAllRanks) {
  const auto failure = [](const MeshShape& shape) {
    return failure_on_all(6, [&](std::shared_ptr<Communicator> world) {
      try {
        Mesh(world, shape);
      } catch (const InvalidArgument&) {
        world->barrier().wait();  // it stays usable
        throw;
      }
    });
  };
  EXPECT_THAT(failure({.pipeline = 4, .data = 2}), HasSubstr("pipeline 4 x data 2 has 8 ranks, but the world has 6"));
  EXPECT_THAT(failure({.pipeline = 1 << 20, .data = 1 << 20}), HasSubstr("has 1099511627776 ranks"));
  EXPECT_THAT(failure({.pipeline = 0, .data = 6}), HasSubstr("got pipeline 0, data 6, expert 1"));
  EXPECT_THAT(failure({.pipeline = 6, .data = -1}), HasSubstr("data -1"));
  EXPECT_THAT(failure({.pipeline = 2, .data = 3, .expert = 2}), HasSubstr("expert 2 does not divide data 3"));
  EXPECT_EQ(failure({.pipeline = 2, .data = 3, .expert = 3}), "");
}

TEST(Mesh, RanksThatWantDifferentOnesAreToldSo) {
  EXPECT_THAT(failure_on_all(4,
                             [](std::shared_ptr<Communicator> world) {
                               const int pipeline = world->rank() == 3 ? 4 : 2;
                               Mesh(world, {.pipeline = pipeline, .data = 4 / pipeline});
                             }),
              AllOf(HasSubstr("ranks disagree about the mesh"), HasSubstr("rank 0: pipeline 2, data 2"),
                    HasSubstr("rank 3: pipeline 4, data 1")));
  EXPECT_THAT(
      failure_on_all(
          2, [](std::shared_ptr<Communicator> world) { Mesh(world, {.pipeline = 2, .data = world->rank() + 1}); }),
      HasSubstr("rank 1: a mesh of pipeline 2 x data 2 has 4 ranks, but the world has 2"));
  EXPECT_THAT(message_of([] { Mesh(nullptr, {}); }), HasSubstr("needs a communicator"));
}

}  // namespace
}  // namespace dualpipe::test
