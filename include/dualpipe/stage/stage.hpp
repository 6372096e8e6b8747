#pragma once

#include <ATen/core/Generator.h>
#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>

#include <any>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/detail/config.hpp"
#include "dualpipe/detail/stage/forward.hpp"
#include "dualpipe/error.hpp"
#include "dualpipe/stage/collective.hpp"
#include "dualpipe/stage/random.hpp"

namespace dualpipe {

/// Which run of a stage this is.
struct StageContext {
  int stage = 0;
  int micro_batch = 0;
  std::int64_t step = 0;  ///< number of training steps before; goes on where load_checkpoint() or set_step() say
  bool training = true;   ///< false in evaluate and predict
  Tensors extras = {};    ///< side inputs of this micro-batch (Batch::extras), the same on every stage
  /// Of this rank's device, for all functions that draw: `torch::bernoulli(p, context.generator)`. Where the pipeline has
  /// a seed (DualPipeOptions::seed), each layer finds it seeded by `random` and its name. It is then LibTorch's default
  /// generator where the rank is a process of its own, and one of the rank's own where ranks are threads. Undefined
  /// without a seed, for which LibTorch takes its default generator.
  at::Generator generator = {};
  std::optional<RandomKey> random = {};  ///< what layer_seed() takes; empty without a seed
  Tensors* added_losses = nullptr;       ///< where add_loss puts them; set by StageRun
  std::any prepared = {};                ///< in Collective::forward: what its prepare() has returned

  /// Adds a loss of this micro-batch to what is trained, from any stage: it is weighted as the loss of the last stage is,
  /// and reported in StepResult::added_losses. Called by the stage's compute functions while they run.
  ///
  /// @throws InvalidArgument  not one floating-point element; not within a compute function.
  DUALPIPE_DECL void add_loss(const at::Tensor& loss) const;
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

class StageRun;

/// A module, and those of its parts that a stage uses.
struct UsedParts {
  std::shared_ptr<torch::nn::Module> whole;
  std::shared_ptr<torch::nn::Module> parts;  ///< they have the names there that they have in the whole
};

/// What a stage computes and communicates, and the module that owns its parameters. A description: the pipeline copies
/// it when it is constructed. Changing the original afterwards would have no effect and throws InvalidArgument; a copy
/// of it may be changed.
class Stage {
 public:
  /// @param module  owner of the parameters and buffers; null: none.
  DUALPIPE_DECL explicit Stage(std::shared_ptr<torch::nn::Module> module = nullptr);
  template <class Contained>
  explicit Stage(const torch::nn::ModuleHolder<Contained>& holder) : Stage(holder.ptr()) {}
  DUALPIPE_DECL Stage(const Stage& other);
  DUALPIPE_DECL Stage& operator=(const Stage& other);
  Stage(Stage&&) noexcept = default;
  Stage& operator=(Stage&&) noexcept = default;
  ~Stage() = default;

  /// Adds a node of ordinary autograd code. Nodes run one after the other, each taking what the one before returned; a
  /// stage without nodes returns its inputs.
  ///
  /// What a stage returns reaches the next one as tensors of their own. So does what a node returns in front of a
  /// collective. Two of these tensors may share memory, as a tensor and its view do, or be one tensor, but writing into
  /// one of them in place is an error, since on another rank the other would not change.
  ///
  /// @throws InvalidArgument  a null function.
  DUALPIPE_DECL Stage& compute(std::string name, Compute compute);
  /// The same of a function in another shape: from (const Tensors&, const StageContext&), const Tensors&, or one to
  /// eight tensors, to a tensor, Tensors, or a tuple or pair of these.
  template <class Function>
    requires(!std::convertible_to<Function, Compute>)
  Stage& compute(std::string name, Function function);
  /// Adds a collective. It takes the tensors at the positions `moves` of what the node before returned, in that order,
  /// and its results take their places; all others pass by untouched, as a residual does.
  ///
  /// @throws InvalidArgument  a null collective; no positions, or one that is negative or named twice.
  DUALPIPE_DECL Stage& communicate(std::string name, std::shared_ptr<Collective> collective, std::vector<int> moves);
  /// Adds the nodes of `next` behind the own ones, their names prefixed `name.`; not its module, of which there may be
  /// one only. The whole splits its backward only where both did, has data-dependent shapes where either had, and takes
  /// what `next` took where it had no nodes before. What `next` ties is now tied as parts of this module, under `name.`.
  DUALPIPE_DECL Stage& append(const std::string& name, const Stage& next);
  /// false: all of the backward in I, nothing in W, for backwards that keep state or draw random numbers. Default true:
  /// an operation with a parameter among its arguments runs its backward twice, once for its input gradients and once
  /// for its weight gradients. One that adds to a registered parameter's gradient itself, or writes to a registered
  /// buffer, is then an error.
  DUALPIPE_DECL Stage& split_backward(bool split);
  /// true: shapes, dtypes or requires_grad of what the stage returns depend on the values that it is given, and not
  /// only on their shapes, on its parameters and on train() or eval(). Default false. On GPU ranks, receivers of what
  /// this stage and those behind it return then wait each time for what the sender's host says of it; of all others,
  /// what has come once is expected again, and something else is an error. On the CPU it makes no difference.
  DUALPIPE_DECL Stage& data_dependent_shapes(bool depend);
  /// true: of the computing nodes added so far, and of those of stages appended so far, a training step keeps what goes
  /// in only, and computes them again before their backward. That takes the time of another forward, for the memory of
  /// all that the backward needs, from the forward to the backward. Gradients are the same bit for bit: the second run
  /// draws the same random numbers, and buffers are put back behind it. A node must give the same twice, and not read
  /// what it changes; writing into what it is given is an error. Side by side, nodes with and without it are nodes of the
  /// chain of their own, as if a collective were between them, and the gradients of a weight that several of them use are
  /// added up in another order. A loss is not computed again.
  DUALPIPE_DECL Stage& recompute(bool recompute);
  /// The nodes added so far, and those of stages appended so far, are of the layer `name` of the model, which the random
  /// numbers that they draw are seeded by (DualPipeOptions::seed). split() calls it; a stage of other nodes has the name
  /// "stage<k>". Layers of one name draw the same.
  ///
  /// @throws InvalidArgument  an empty name.
  DUALPIPE_DECL Stage& layer(const std::string& name);
  /// Of its module, the stage uses these parts only: modules, parameters and buffers, by their names there. So a model that
  /// is not cut can be every stage's module, while each stage's nodes call parts of it:
  /// `Stage(model).uses({"norm", "blocks.3"}).compute(...)`. All else in the module is no part of the pipeline: neither
  /// moved to its device nor summed, saved or counted. A node, or the loss, that gives it to an operation fails with its
  /// name. module() is a module of the parts then, with the same names; train() and eval() reach the whole one too.
  ///
  /// @throws InvalidArgument  no module; no such part; a part twice or inside another one; called before.
  DUALPIPE_DECL Stage& uses(const std::vector<std::string>& parts);
  /// A parameter, a buffer, or all of those in a module, by its name in the stage's module, is one tensor of the model
  /// with what other stages tie as the same name. The other stages may be on other ranks: each rank has one copy. All
  /// copies begin with the value of the lowest rank, gradients are summed over all of them, and the tensor is owned,
  /// counted, clipped and saved once, under its name in the lowest stage. Stages of one rank give the same tensor.
  ///
  /// @param name  of the tensor for all stages that have it; empty: `part`. Of a module's tensors, the beginning of it.
  /// @throws InvalidArgument  an empty part; one that is tied already. Of the pipeline's constructor, on every rank: no
  ///                          such part; a name that one stage has alone; tensors of one name with different sizes or
  ///                          dtypes, or several of them on one rank; a part of experts.
  DUALPIPE_DECL Stage& tie(const std::string& part, const std::string& name = "");
  /// Number of tensors the stage takes, where known; a micro-batch with another number is an error before user code
  /// runs.
  DUALPIPE_DECL Stage& takes(int num_inputs);

  /// For pipelines: from now on this stage, and all that it was copied from or to unchanged, refuse to be changed. A
  /// copy made afterwards is a stage of its own.
  ///
  /// @param rank, stage  the pipeline's, for the error.
  void freeze(int rank, int stage) const noexcept { owner_->rank = rank, owner_->stage = stage; }

  const std::shared_ptr<torch::nn::Module>& module() const noexcept { return description_->module; }
  /// What uses() was called for, here and in stages appended so far.
  const std::vector<UsedParts>& used_parts() const noexcept { return description_->used; }
  /// What tie() was called for: the names, by part.
  const std::map<std::string, std::string>& ties() const noexcept { return description_->ties; }
  bool splits_backward() const noexcept { return description_->split; }
  bool has_data_dependent_shapes() const noexcept { return description_->data_dependent_shapes; }
  std::optional<int> num_inputs() const noexcept { return description_->num_inputs; }
  DUALPIPE_DECL std::vector<std::string> node_names() const;

  /// What runs as one piece: compute nodes that follow one another are one node of the chain, with one autograd graph,
  /// but for recompute().
  /// One letter per node, as pair_order takes them: 'C' computes, 'X' communicates. A stage without nodes is "C".
  ///
  /// @param with_loss  the loss needs a graph: a stage that ends in a collective, or in a node that is computed again,
  ///                   gets a node for it.
  DUALPIPE_DECL std::string structure(bool with_loss = false) const;
  /// Length of structure().
  DUALPIPE_DECL int num_nodes(bool with_loss = false) const;
  /// Whether it has a collective.
  DUALPIPE_DECL bool communicates() const;
  /// Whether a node of the chain is computed again before its backward.
  DUALPIPE_DECL bool recomputes(int node) const;
  /// Of a node of the chain, for messages and pictures: "attention", "norm to MLP", "loss".
  DUALPIPE_DECL std::string chain_name(int node) const;

  /// Runs one micro-batch forward on the calling thread and waits for its collectives. Arguments and errors are those
  /// of StageRun, which goes node by node (dualpipe/stage/stage_run.hpp).
  DUALPIPE_DECL StageRun forward(Tensors inputs, StageContext context, StageLoss loss = nullptr) const;

 private:
  friend class StageRun;
  struct Node {
    std::string name;
    Compute compute;
    std::shared_ptr<const Communication> communication;
    bool recompute = false;
    std::string layer = {};        // of the model; empty: that of the stage
    bool goes_on = false;          // a node before is of this layer
    bool to_be_continued = false;  // a node behind is
  };
  /// Nodes [begin, end): one collective, or any number of computing ones.
  struct Segment {
    std::size_t begin = 0;
    std::size_t end = 0;
  };
  /// Shared by copies until one of them is changed.
  struct Description {
    std::shared_ptr<torch::nn::Module> module;
    std::vector<Node> nodes = {};
    std::vector<Segment> chain = {};
    bool split = true;
    bool data_dependent_shapes = false;
    std::optional<int> num_inputs = {};
    std::vector<UsedParts> used = {};
    std::map<std::string, std::string> ties = {};
  };
  /// The pipeline's stage that was built of it. Ranks that are threads may build theirs of copies of one stage.
  struct Owner {
    std::atomic<int> rank{-1}, stage{-1};  // -1: none
  };

  /// Of this stage alone, to be changed.
  DUALPIPE_DECL Description& change(const std::string& what);
  DUALPIPE_DECL void add(Node node);
  /// Puts node `index` behind the last of the chain.
  static DUALPIPE_DECL void link(Description& own, std::size_t index);
  const std::vector<Node>& nodes() const { return description_->nodes; }
  /// Of a node of the chain; empty for one that the chain has only for the loss, or for an empty stage.
  DUALPIPE_DECL Segment segment(int node) const;

  std::shared_ptr<Description> description_;
  std::shared_ptr<Owner> owner_ = std::make_shared<Owner>();
};

template <class Function>
  requires(!std::convertible_to<Function, Compute>)
Stage& Stage::compute(std::string name, Function function) {
  if constexpr (std::invocable<Function&, const Tensors&, const StageContext&>) {
    return compute(std::move(name), Compute([function = std::move(function)](const Tensors& inputs,
                                                                             const StageContext& context) mutable {
                     return detail::to_tensors(function(inputs, context));
                   }));
  } else {
    using Forward = detail::AsForward<Function>;
    static_assert(detail::takes_any_tensors<Forward>,
                  "Stage::compute takes a function of (const Tensors&, const StageContext&), of const Tensors&, or of "
                  "one to eight tensors");
    return compute(
        name, Compute([name, forward = Forward{std::move(function)}](const Tensors& inputs,
                                                                     const StageContext& context) mutable {
          return detail::call_forward(forward, inputs, [&] {
            throw InvalidArgument(detail::str("node '", name, "' of stage ", context.stage, " does not take ",
                                              inputs.size(), " tensors (micro-batch ", context.micro_batch, ")"));
          });
        }));
  }
}

}  // namespace dualpipe

#if defined(DUALPIPE_HEADER_ONLY)
#include "dualpipe/detail/stage/stage.ipp"
#endif
