#pragma once

#include <torch/nn/module.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/error.hpp"
#include "dualpipe/stage/collective.hpp"
#include "dualpipe/stage/split_backward.hpp"

namespace dualpipe {

/// Which run of a stage this is.
struct StageContext {
  int stage = 0;
  int micro_batch = 0;
  std::int64_t step = 0;  ///< number of training steps begun before
  bool training = true;   ///< false in evaluate and predict
  const Tensors& extras;  ///< side inputs of this micro-batch (Batch::extras), the same on every stage
};

/// Ordinary autograd code from tensors to tensors.
using Compute = std::function<Tensors(const Tensors& inputs, const StageContext& context)>;

/// From the outputs of the last stage to a floating-point tensor of one element.
using StageLoss = std::function<at::Tensor(const Tensors& outputs)>;

/// A collective in a stage.
struct Communication {
  std::shared_ptr<Collective> collective;
  std::vector<int> moves;  ///< positions of the tensors that it moves
};

/// One micro-batch that went forward through a stage and waits for its backward. Output gradients are one per output,
/// or the single gradient of the loss (a tensor without dimensions) where there was one.
struct StageActivation {
  /// What one node of the chain left.
  struct Node {
    BackwardGraph graph;                                 ///< computing nodes; empty outside of training
    std::shared_ptr<const Communication> communication;  ///< null: the node computes
    std::shared_ptr<void> handle;                        ///< of the collective
    bool whole = false;                                  ///< the weight part ran with the input part
  };

  Tensors outputs;    ///< detached, each with the requires_grad of what the stage returned (false outside of training)
  at::Tensor loss;    ///< detached, without dimensions; undefined without loss function
  bool split = true;  ///< false: I does the whole backward, W nothing
  std::vector<Node> nodes;

  // For the whole chain at once; waits for its collectives. BackwardPass goes node by node.
  Tensors backward(const Tensors& output_gradients);        ///< B, see BackwardGraph
  Tensors backward_input(const Tensors& output_gradients);  ///< I
  void backward_weight();                                   ///< W, to be called after every I, whether split or not
  void backward_weight(int node);                           ///< of one node, after its I
  /// The next part of one node's W, see BackwardGraph. False: nothing is left.
  bool backward_weight_part(int node);
  bool has_weight_part(int node) const;  ///< once its I has run: there is something for W
};

/// What a stage computes and communicates, and the module that owns its parameters. A description: the pipeline copies
/// it when it is constructed. Changing the original afterwards would have no effect and throws InvalidArgument; a copy
/// of it may be changed.
class Stage {
 public:
  /// @param module  owner of the parameters and buffers; null: none.
  explicit Stage(std::shared_ptr<torch::nn::Module> module = nullptr);

  /// Adds a node of ordinary autograd code. Nodes run one after the other, each taking what the one before returned; a
  /// stage without nodes returns its inputs.
  ///
  /// @throws InvalidArgument  a null function.
  Stage& compute(std::string name, Compute compute);
  /// Adds a collective. It takes the tensors at the positions `moves` of what the node before returned, in that order,
  /// and its results take their places; all others pass by untouched, as a residual does.
  ///
  /// @throws InvalidArgument  a null collective; no positions, or one that is negative or named twice.
  Stage& communicate(std::string name, std::shared_ptr<Collective> collective, std::vector<int> moves);
  /// Adds the nodes of `next` behind the own ones, their names prefixed `name.`; not its module, of which there may be
  /// one only. The whole splits its backward only where both did, has data-dependent shapes where either had, and takes
  /// what `next` took where it had no nodes before.
  Stage& append(const std::string& name, const Stage& next);
  /// false: all of the backward in I, nothing in W, for backwards that keep state or draw random numbers. Default true.
  Stage& split_backward(bool split);
  /// true: shapes, dtypes or requires_grad of what the stage returns depend on the values that it is given, and not
  /// only on their shapes, on its parameters and on train() or eval(). Default false. On GPU ranks, receivers of what
  /// this stage and those behind it return then wait each time for what the sender's host says of it; of all others,
  /// what has come once is expected again, and something else is an error. On the CPU it makes no difference.
  Stage& data_dependent_shapes(bool depend);
  /// Number of tensors the stage takes, where known; a micro-batch with another number is an error before user code
  /// runs.
  Stage& takes(int num_inputs);

  /// For pipelines: from now on this stage, and those it was copied from as it is, refuse to be changed.
  void freeze(int rank, int stage) const noexcept { built_.set(rank, stage); }

  const std::shared_ptr<torch::nn::Module>& module() const noexcept { return module_; }
  bool splits_backward() const noexcept { return split_; }
  bool has_data_dependent_shapes() const noexcept { return data_dependent_shapes_; }
  std::vector<std::string> node_names() const;

  /// What runs as one piece: compute nodes that follow one another are one node of the chain, with one autograd graph.
  /// One letter per node, as pair_order takes them: 'C' computes, 'X' communicates. A stage without nodes is "C".
  ///
  /// @param with_loss  the loss needs a graph: a stage that ends in a collective gets a node for it.
  std::string structure(bool with_loss = false) const;
  /// Whether it has a collective.
  bool communicates() const;
  /// Of a node of the chain, for messages and pictures: "attention", "norm to MLP", "loss".
  std::string chain_name(int node) const;

  /// Runs one micro-batch on the calling thread, with gradients enabled in training and disabled otherwise, and waits
  /// for its collectives. What user code throws comes through as it is. ForwardPass goes node by node.
  ///
  /// @param inputs  as received: detached, requires_grad() saying which are differentiable; may be undefined.
  /// @param loss    last stage only, null elsewhere. Its gradients flow through the same graph.
  /// @throws InvalidArgument  another number of inputs than the stage takes, a loss that is not one floating-point
  ///                          element, a collective that moves a tensor that is not there or returns another number.
  StageActivation forward(const Tensors& inputs, const StageContext& context, const StageLoss& loss = nullptr) const;

 private:
  friend class ForwardPass;
  struct Node {
    std::string name;
    Compute compute;
    std::shared_ptr<const Communication> communication;
  };
  /// Nodes [begin, end), one collective or any number of computing ones.
  struct Segment {
    std::size_t begin = 0;
    std::size_t end = 0;
  };

  /// The pipeline that copied a stage, known to all stages that are copies of one another and unchanged since.
  class Built {
   public:
    Built() : place_(std::make_shared<Place>()) {}
    Built(const Built& other) : place_(other.stage() < 0 ? other.place_ : std::make_shared<Place>()) {}
    Built& operator=(const Built& other) { return place_ = Built(other).place_, *this; }
    ~Built() = default;
    void set(int rank, int stage) const noexcept { place_->rank = rank, place_->stage = stage; }
    int rank() const noexcept { return place_->rank; }
    int stage() const noexcept { return place_->stage; }  ///< -1: none

   private:
    struct Place {
      std::atomic<int> rank{-1}, stage{-1};
    };
    std::shared_ptr<Place> place_;
  };

  /// Checks that it may be changed; from now on it is a stage of its own.
  void change(const std::string& what);
  void add(Node node);

  std::shared_ptr<torch::nn::Module> module_;
  std::vector<Node> nodes_;
  std::vector<Segment> chain_;
  bool split_ = true;
  bool data_dependent_shapes_ = false;
  std::optional<int> num_inputs_;
  Built built_;
};

using StageFactory = std::function<Stage(int stage)>;

}  // namespace dualpipe
