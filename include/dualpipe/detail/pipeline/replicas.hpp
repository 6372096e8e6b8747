#pragma once

#include <torch/nn/module.h>

#include <map>
#include <memory>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/schedule/schedule.hpp"
#include "dualpipe/stage/stage.hpp"

namespace dualpipe {

/// Parameters of all stages, each once, in registration order: stages ascending, and within one as named_parameters
/// gives them.
Tensors unique_parameters(const std::map<int, Stage>& stages);

/// Keeps the copies of a stage on several ranks equal.
class Replicas {
 public:
  /// Collective: one sub-communicator for each distinct set of ranks that hold the same stages.
  ///
  /// @throws InvalidArgument  a parameter shared by stages that different sets of ranks hold.
  Replicas(Communicator& communicator, const Schedule& schedule, const std::map<int, Stage>& stages);

  /// Collective: each parameter's `.grad` becomes the sum over the holders, bitwise the same on all of them. One absent
  /// on some holders counts as zeros there; one absent on all stays undefined. Sparse gradients become dense.
  void sum_gradients();
  /// Collective: parameters and buffers of the lowest holder replace the others'.
  void broadcast();
  /// Collective: floating-point buffers only (running statistics), as DistributedDataParallel does.
  void broadcast_buffers();

  /// Parameters for which this rank is the lowest holder; over all ranks every parameter of the model is counted once.
  const Tensors& counted_parameters() const noexcept { return counted_; }

 private:
  struct Group {
    std::shared_ptr<Communicator> communicator;
    Tensors parameters;
    Tensors buffers;
  };
  std::vector<Group> groups_;
  Tensors counted_;
};

}  // namespace dualpipe
