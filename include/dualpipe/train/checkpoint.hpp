#pragma once

#include <torch/nn/module.h>
#include <torch/nn/pimpl.h>
#include <torch/optim/optimizer.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <variant>

namespace dualpipe {

using CheckpointValue = std::variant<std::int64_t, double, std::string>;

/// What a checkpoint holds beside weights, optimizer states and random state: whatever the loop needs to go on, as the
/// position in the data.
struct CheckpointExtra {
  std::int64_t step = 0;                               ///< steps done, >= 0; names the folder
  std::map<std::string, CheckpointValue> values = {};  ///< the same on all ranks; numbers finite, texts UTF-8
  std::map<std::string, at::Tensor> tensors = {};      ///< those of rank 0 are kept, and come back on the CPU
};

/// The same on all ranks.
struct CheckpointOptions {
  int keep = 0;  ///< when a checkpoint is complete, the oldest are removed until so many are left; 0: none is removed
  bool asynchronous = false;  ///< CheckpointWriter::save returns after a copy to the host, and a thread writes
  /// Tensors are named as within their stage's module. `split` makes such names unique; hand-made stages may use one
  /// name in several stages, and experts one in several parts. With this, names begin with "stage<k>.", those of experts
  /// with "stage<k>.part<p>.", and the checkpoint fits the same cut and the same expert groups only.
  bool stage_prefix = false;
};

/// Writes checkpoints of a run into a folder, each as a folder `step-00000123`.
///
/// `model` is a DualPipe, or a module that one process trains alone. With a DualPipe every method but the destructor is
/// collective over DualPipeImpl::world(), the ranks of all its replicas: their threads call it, and every rank gets the
/// same result or the same error. `folder` is then one that all ranks share.
///
/// A checkpoint appears whole or not at all: it is written beside as `step-00000123.partial` and renamed when all of it
/// is on the disk. One of the same step is replaced. What a killed run left behind is removed by the next save().
class CheckpointWriter {
 public:
  explicit CheckpointWriter(std::string folder, CheckpointOptions options = {});
  /// Ends a write under way without its peers: a checkpoint for which wait() was not called may be missing.
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  /// Calls wait() first. Each tensor is written by the lowest rank that holds it, each state of the optimizer by the
  /// lowest whose optimizer has it.
  ///
  /// @param optimizer  torch::optim::SGD, Adam, AdamW, Adagrad or RMSprop, of parameters of `model`: all of this rank's,
  ///                   or a part of them. On all ranks the same kind, with the same number of parameter groups and the
  ///                   same options of each; a group may have other parameters on each rank, or none.
  /// @throws InvalidArgument  a folder that cannot be written or that ranks do not share, a full disk, a later step in
  ///                          the folder, names of several tensors, another optimizer, a parameter in another group on
  ///                          another rank. Earlier checkpoints are what they were.
  /// @throws CommError        another rank failed, here and below.
  void save(const torch::nn::Module& model, const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra);
  template <class Contained>
  void save(const torch::nn::ModuleHolder<Contained>& model, const torch::optim::Optimizer& optimizer,
            const CheckpointExtra& extra) {
    save(*model, optimizer, extra);
  }
  /// Returns when the checkpoint of the last save() is complete.
  ///
  /// @throws InvalidArgument  it could not be written; said once, and the next save() works.
  void wait();

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

/// Collective: CheckpointWriter::save, and wait().
void save_checkpoint(const std::string& folder, const torch::nn::Module& model,
                     const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra = {},
                     const CheckpointOptions& options = {});

/// The step of the latest complete checkpoint in the folder of a run; none where there is none yet, or no folder. Looks
/// by itself: only after a barrier may another rank save there.
///
/// @throws InvalidArgument  the folder cannot be read.
std::optional<std::int64_t> latest_checkpoint(const std::string& folder);

/// Collective. Parameters, buffers, optimizer states, options of parameter groups become what they were when the
/// checkpoint was saved, whatever the schedule, the number of ranks and replicas, and the parameters that each rank's
/// optimizer has, then and now. With as many ranks as then, so does the state of LibTorch's default CPU generator on
/// each. A DualPipe counts its steps from there (set_step).
///
/// Everything is checked, and read into host memory, before anything is changed.
///
/// @param folder  that of the run, of which the latest step is loaded, or that of one step.
/// @throws InvalidArgument  on every rank: no checkpoint there; one that is cut off or altered, of a newer format, of
///                          another model (the tensors are named), of another kind of optimizer, or another one on
///                          another rank.
CheckpointExtra load_checkpoint(const std::string& folder, torch::nn::Module& model,
                                torch::optim::Optimizer& optimizer);

struct LoadWeightsOptions {
  /// From the name of a parameter or buffer to that in the file; empty: it keeps its value. None: the same names.
  std::function<std::string(const std::string& name)> file_name = {};
  bool allow_unused = false;  ///< tensors of the file that the model does not take are no error
  bool stage_prefix = false;  ///< names of the model begin with "stage<k>.", see CheckpointOptions
};

/// Collective. Parameters and buffers from any safetensors checkpoint. Floating-point tensors are converted to the
/// model's dtype. Checked before anything is changed, as by load_checkpoint.
///
/// @param path  a .safetensors file, an index as Hugging Face has it (model.safetensors.index.json), a folder that has
///              either, or the folder of a run.
/// @throws InvalidArgument  on every rank: tensors that are missing, unused or of other sizes are named.
void load_weights(const std::string& path, torch::nn::Module& model, const LoadWeightsOptions& options = {});

template <class Contained>
void save_checkpoint(const std::string& folder, const torch::nn::ModuleHolder<Contained>& model,
                     const torch::optim::Optimizer& optimizer, const CheckpointExtra& extra = {},
                     const CheckpointOptions& options = {}) {
  save_checkpoint(folder, static_cast<const torch::nn::Module&>(*model), optimizer, extra, options);
}
template <class Contained>
CheckpointExtra load_checkpoint(const std::string& folder, const torch::nn::ModuleHolder<Contained>& model,
                                torch::optim::Optimizer& optimizer) {
  return load_checkpoint(folder, static_cast<torch::nn::Module&>(*model.ptr()), optimizer);
}
template <class Contained>
void load_weights(const std::string& path, const torch::nn::ModuleHolder<Contained>& model,
                  const LoadWeightsOptions& options = {}) {
  load_weights(path, static_cast<torch::nn::Module&>(*model.ptr()), options);
}

}  // namespace dualpipe
