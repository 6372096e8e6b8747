#pragma once

#include <torch/nn/module.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/config.hpp"
#include "layers.hpp"
#include "report.hpp"

namespace moe {

struct ModelSize {
  example::ModelSize transformer{.layers = 4};
  int experts = 8;           ///< of each block
  int top_k = 2;             ///< experts that each byte goes to
  int expert_width = 128;    ///< hidden features of an expert
  double bias_rate = 0.001;  ///< by which the bias of an expert changes after a step; 0: no biases
};

/// @throws dualpipe::InvalidArgument  sizes below 1, more experts per byte than there are, or experts that the ranks
///                                    that share them do not divide.
void check(const ModelSize& size, int num_sharing);

/// What flows between layers: x and the balance loss. The others are there within a block only, between the nodes that
/// make and that take them.
enum Slot : std::size_t {
  x,        ///< [batch, length, width]
  balance,  ///< [1], the sum over the blocks so far: see block_of
  rows,     ///< [bytes * top_k, width], ordered by expert; behind the dispatch those that came
  weight,   ///< [rows, 1]: what the router gives that expert
  token,    ///< [rows], int64: which of this rank's bytes the row is; stays here
  splits,   ///< of each rank's experts, as dualpipe::all_to_all takes and gives them: then on the CPU
  num_slots
};

/// A byte-level transformer whose blocks have experts instead of one MLP: "embedding", "block0", "block1", …,
/// "norm_head", which takes int64 [batch, length] with length <= context and gives the logits of each position's next
/// byte, [batch, length, 256], and the balance loss, [1].
///
/// Each block is four nodes, attention, dispatch, MLP and combine. The router takes the `top_k` likeliest experts of a
/// softmax over all and weighs their results by their shares of it. Its balance loss is E * sum over the experts of the
/// share of rows they get times their mean probability, minus 1: zero where all are used alike (Fedus, Zoph and
/// Shazeer, "Switch Transformers", 2022). Experts are chosen by their probability plus a bias, which adjust_biases()
/// changes after a step and which has no other effect (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, 2.1.2).
///
/// The first weights follow from `seed`, the block and the expert alone: however the layers are cut into stages and the
/// experts spread over ranks, the model is the same.
///
/// @param sharing  the ranks that hold the experts of a stage together, its k-th rank the k-th part of them.
std::vector<dualpipe::NamedLayer> layers_of(const ModelSize& size, std::uint64_t seed,
                                            const std::shared_ptr<dualpipe::Communicator>& sharing);

/// What each of these layers costs beside the others, in multiply-adds per byte.
std::vector<double> layer_costs(const ModelSize& size);

/// Whether a parameter of the pipeline belongs to an expert, by its name.
bool is_expert(const std::string& parameter);

/// DualPipeOptions::buffers of a pipeline of these layers: the bytes that go to each expert are counted over all ranks.
std::map<std::string, dualpipe::BufferReduction> buffers();
/// After a step: raises the biases of experts that got less than their share in it, and lowers the others'.
///
/// @param model  a pipeline, or a module that has such layers.
/// @return       by block: what each expert got in the step, and its bias now.
example::Routings adjust_biases(const torch::nn::Module& model);

/// "4 blocks, width 64, …"
std::string description(const ModelSize& size);

}  // namespace moe
