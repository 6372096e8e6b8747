#pragma once

#include <functional>
#include <memory>
#include <string>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/pipeline/dual_pipe.hpp"

namespace example {

/// Pipelines side by side. Each trains on batches of its own; ranks at the same place in different pipelines hold the
/// same stages, and some of them may share the experts of these stages among themselves.
///
/// Rank r of the world is at place r % length of pipeline r / length. Pipelines k * sharing to (k + 1) * sharing - 1
/// hold all experts together.
class Grid {
 public:
  /// Collective.
  ///
  /// @param num_pipelines  divides the size of the world.
  /// @param num_sharing    pipelines that share one set of experts: divides num_pipelines.
  Grid(std::shared_ptr<dualpipe::Communicator> world, int num_pipelines, int num_sharing);

  /// @throws dualpipe::InvalidArgument  numbers that do not divide each other; the text says which do.
  static void check(int num_ranks, int num_pipelines, int num_sharing);

  int num_pipelines() const { return peers_->size(); }
  int pipeline_index() const { return peers_->rank(); }
  const std::shared_ptr<dualpipe::Communicator>& world() const { return world_; }
  /// The ranks of this pipeline.
  const std::shared_ptr<dualpipe::Communicator>& pipeline() const { return pipeline_; }
  /// Those at this place that share its experts: rank k of them holds the k-th part.
  const std::shared_ptr<dualpipe::Communicator>& sharing() const { return sharing_; }

  /// Tells parameters of experts from those that every pipeline holds, by their names in the pipeline.
  using IsExpert = std::function<bool(const std::string& name)>;

  /// Collective: adds up the gradients over the pipelines, those of experts over the ranks that hold the same ones.
  /// Gradients of a pipeline's experts already hold what the batches of those it shares them with give.
  void sum_gradients(dualpipe::DualPipeImpl& pipe, const IsExpert& is_expert) const;
  /// Collective: scales the gradients of the whole model to a 2-norm of at most `max_norm`, each parameter counted
  /// once.
  ///
  /// @return  the norm before.
  double clip_gradients(dualpipe::DualPipeImpl& pipe, const IsExpert& is_expert, double max_norm) const;

 private:
  std::shared_ptr<dualpipe::Communicator> world_;
  std::shared_ptr<dualpipe::Communicator> pipeline_;
  std::shared_ptr<dualpipe::Communicator> peers_;    // at this place, in all pipelines
  std::shared_ptr<dualpipe::Communicator> sharing_;  // of these, the ones that share one set of experts
  std::shared_ptr<dualpipe::Communicator> alike_;    // of these, the ones that hold the same experts
};

}  // namespace example
