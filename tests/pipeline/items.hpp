#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "dualpipe/train/mesh.hpp"
#include "pipeline/pipeline.hpp"

// What a training loop needs of a pipeline, item by item, each beside one process that does the same. Ranks that are
// threads and ranks that are processes run the same items.
namespace dualpipe::test {

/// A schedule's kind and its mesh.
struct Layout {
  std::string kind;
  MeshShape mesh;
};

struct Expected {
  at::Tensor tensor;
  double tolerance = 1e-12;  ///< relative to the largest value; 0: bit for bit
};
using Found = std::map<std::string, at::Tensor>;
using Truth = std::map<std::string, Expected>;

struct Item {
  std::string name;
  std::function<Truth(const Layout&)> truth;                       ///< of one process
  std::function<Found(const Mesh&, const std::string& kind)> run;  ///< what a rank has of it
};
std::vector<Item> items();

/// All kinds on so many ranks; on four also replicas of two.
std::vector<Layout> layouts_of(int num_ranks);

/// Runs an item on this rank, and expects all that it finds to be that of one process.
///
/// @return  the names of what it found.
inline std::vector<std::string> expect_item(const Item& item, const Mesh& mesh, const std::string& kind,
                                            const Truth& truth) {
  std::vector<std::string> names;
  for (const auto& [name, tensor] : item.run(mesh, kind)) {
    names.push_back(name);
    const auto expected = truth.find(name);
    if (expected == truth.end()) {
      ADD_FAILURE() << item.name << " with " << kind << ": one process has no " << name;
      continue;
    }
    EXPECT_LE(difference(tensor, expected->second.tensor), expected->second.tolerance)
        << item.name << " with " << kind << " on " << mesh.shape().pipeline << " x " << mesh.shape().data << ": "
        << name;
  }
  return names;
}

}  // namespace dualpipe::test
