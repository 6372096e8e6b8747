#include "grid.hpp"

#include <torch/torch.h>

#include <utility>

#include "dualpipe/error.hpp"
#include "dualpipe/train/clip.hpp"

namespace example {

using dualpipe::Tensors;

void Grid::check(int num_ranks, int num_pipelines, int num_sharing) {
  DUALPIPE_CHECK(num_ranks % num_pipelines == 0, num_ranks, num_ranks == 1 ? " rank" : " ranks",
                 " cannot form pipelines of equal length when there are to be ", num_pipelines,
                 "; start a multiple of that, or give another --pipelines");
  DUALPIPE_CHECK(num_pipelines % num_sharing == 0, "experts are shared by ", num_sharing, " pipelines each, but ",
                 num_pipelines, " pipelines do not divide into such groups; give another --expert-parallel");
}

Grid::Grid(std::shared_ptr<dualpipe::Communicator> world, int num_pipelines, int num_sharing)
    : world_(std::move(world)) {
  check(world_->size(), num_pipelines, num_sharing);
  const int length = world_->size() / num_pipelines;
  const int pipeline = world_->rank() / length, place = world_->rank() % length;
  pipeline_ = world_->split(pipeline, place);
  peers_ = world_->split(place, pipeline);
  sharing_ = peers_->split(pipeline / num_sharing, pipeline);
  alike_ = peers_->split(pipeline % num_sharing, pipeline);
}

void Grid::sum_gradients(dualpipe::DualPipeImpl& pipe, const IsExpert& is_expert) const {
  Tensors shared, experts;
  for (auto& item : pipe.named_parameters()) {
    torch::Tensor& gradient = item.value().mutable_grad();
    if (!gradient.defined()) gradient = torch::zeros_like(item.value());  // others may have one
    (is_expert && is_expert(item.key()) ? experts : shared).push_back(gradient);
  }
  dualpipe::Pending of_all = peers_->all_reduce(std::move(shared));
  dualpipe::Pending of_alike = alike_->all_reduce(std::move(experts));
  of_all.wait();
  of_alike.wait();
}

double Grid::clip_gradients(dualpipe::DualPipeImpl& pipe, const IsExpert& is_expert, double max_norm) const {
  Tensors counted;
  for (const auto& stage : pipe.named_children()) {
    const int number = std::stoi(stage.key().substr(std::string("stage").size()));
    if (dualpipe::holders(pipe.schedule(), number).front() != pipeline_->rank()) continue;
    for (const auto& item : stage.value()->named_parameters(/*recurse=*/true)) {
      const bool expert = is_expert && is_expert(stage.key() + '.' + item.key());
      if ((expert ? alike_ : peers_)->rank() == 0) counted.push_back(item.value());
    }
  }
  return dualpipe::clip_grad_norm(*world_, counted, pipe.parameters(), max_norm).item<double>();
}

}  // namespace example
