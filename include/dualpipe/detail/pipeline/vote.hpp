#pragma once

#include <ATen/ATen.h>

#include <array>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "dualpipe/comm/communicator.hpp"
#include "dualpipe/detail/pipeline/call_statement.hpp"
#include "dualpipe/detail/pipeline/device_hash.hpp"
#include "dualpipe/detail/pipeline/executor.hpp"
#include "dualpipe/train/mesh.hpp"

namespace dualpipe::detail {

/// How a step has ended.
struct StepVote {
  at::Tensor losses;                  ///< [replicas * num_micro_batches] float64 in memory of the host
  at::Tensor sums;                    ///< as sums_of() gives it, over all ranks, in memory of the host
  std::int64_t num_metrics = -1;      ///< that the loss function returns; -1: there was none
  std::vector<MemberHashes> hashes;   ///< by rank
  std::vector<std::string> findings;  ///< by rank: which gradients are not finite; empty: none
};

/// What a rank says at the end of a step. Its bytes travel: this head, a loss for each of its micro-batches, its sums
/// where it has any, and its finding.
struct BallotHead {
  std::int64_t num_losses = 0;
  std::int64_t num_metrics = -1;  ///< as in StepVote
  std::array<std::uint64_t, 3> hashes{};
  std::array<std::uint8_t, 3> has_hash{};
  std::uint32_t finding_size = 0;
};
struct BallotLoss {
  std::int64_t micro_batch = 0;  ///< counted over all replicas
  double loss = 0;
};

/// Whose losses a rank knows, and how many there are.
struct MicroBatchCount {
  int of_replica = 0;
  int num_replicas = 1;
  int replica = 0;
  int num_stages = 0;
  int num_sums() const { return LossFn::max_metrics + num_stages; }
  int all() const { return num_replicas * of_replica; }
  /// The number of a micro-batch of this replica over all replicas.
  int number(int micro_batch) const { return replica * of_replica + micro_batch; }
};

/// What a rank adds to the sums over all ranks: float64 [max_metrics], of which the metrics are the first, and then the
/// added losses of each stage.
inline at::Tensor sums_of(const RunOutputs& outputs, const MicroBatchCount& count, const at::Device& device) {
  at::Tensor sums = at::zeros({count.num_sums()}, at::device(device).dtype(at::kDouble));
  for (std::size_t i = 0; i < outputs.metrics.size(); ++i) sums[static_cast<std::int64_t>(i)].copy_(outputs.metrics[i]);
  for (const auto& [stage, loss] : outputs.added_losses) sums[LossFn::max_metrics + stage].copy_(loss);
  return sums;
}

/// @param sums  on the host; undefined: none.
inline std::string packed_ballot(const MemberHashes& hashes, const RunOutputs& outputs,
                                 const std::vector<BallotLoss>& losses, const at::Tensor& sums,
                                 const std::string& finding = {}) {
  BallotHead head;
  head.finding_size = static_cast<std::uint32_t>(finding.size());
  head.num_losses = std::ssize(losses);
  if (!outputs.losses.empty()) head.num_metrics = std::ssize(outputs.metrics);
  for (std::size_t i = 0; i < hashes.size(); ++i) {
    head.has_hash[i] = hashes[i].has_value() ? 1 : 0;
    head.hashes[i] = hashes[i].value_or(0);
  }
  std::string ballot(reinterpret_cast<const char*>(&head), sizeof head);
  for (const BallotLoss& loss : losses) ballot.append(reinterpret_cast<const char*>(&loss), sizeof loss);
  if (sums.defined()) ballot.append(static_cast<const char*>(sums.const_data_ptr()), sums.nbytes());
  ballot += finding;
  return ballot;
}

/// @param losses, sums  of the result, zeros.
/// @throws Error            there is not one ballot of each of the `num_ranks`.
/// @throws InvalidArgument  the same on all ranks: one has committed something else than a step of the pipeline, or loss
///                          functions return different numbers of metrics.
inline StepVote unpacked(const std::vector<std::string>& ballots, int num_ranks, at::Tensor losses, at::Tensor sums) {
  if (std::ssize(ballots) != num_ranks)
    throw Error(str("the communicator ends a step with ", ballots.size(), " ballots of ", num_ranks, " ranks"));
  StepVote result{.losses = std::move(losses), .sums = std::move(sums), .hashes = {}, .findings = {}};
  const auto check = [](bool right) {
    DUALPIPE_CHECK(right,
                   "a rank has called Communicator::commit() of the pipeline's communicator, beside step(), with a "
                   "ballot of its own; use another communicator");
  };
  for (const std::string& ballot : ballots) {
    BallotHead head;
    check(ballot.size() >= sizeof head);
    std::memcpy(&head, ballot.data(), sizeof head);
    check(head.num_losses >= 0 && head.num_losses <= result.losses.numel());
    const std::size_t losses_end = sizeof head + head.num_losses * sizeof(BallotLoss);
    check(ballot.size() >= losses_end + head.finding_size);
    const std::size_t sums_end = ballot.size() - head.finding_size;
    check(sums_end == losses_end || sums_end == losses_end + result.sums.nbytes());
    result.findings.push_back(ballot.substr(sums_end));
    MemberHashes hashes;
    for (std::size_t i = 0; i < hashes.size(); ++i)
      if (head.has_hash[i] != 0) hashes[i] = head.hashes[i];
    result.hashes.push_back(hashes);
    if (head.num_metrics >= 0) {
      DUALPIPE_CHECK(result.num_metrics < 0 || result.num_metrics == head.num_metrics,
                     "the loss functions of ranks return different numbers of metrics: ", result.num_metrics, " and ",
                     head.num_metrics, "; all return the same");
      result.num_metrics = head.num_metrics;
    }
    for (std::size_t at = sizeof head; at < losses_end; at += sizeof(BallotLoss)) {
      BallotLoss loss;
      std::memcpy(&loss, ballot.data() + at, sizeof loss);
      check(loss.micro_batch >= 0 && loss.micro_batch < result.losses.numel());
      result.losses.mutable_data_ptr<double>()[loss.micro_batch] = loss.loss;
    }
    for (std::size_t at = losses_end; at < sums_end; at += sizeof(double)) {
      double value = 0;
      std::memcpy(&value, ballot.data() + at, sizeof value);
      result.sums.mutable_data_ptr<double>()[(at - losses_end) / sizeof(double)] += value;
    }
  }
  return result;
}

/// Ranks of a replica that pass a member of the batch pass the same values.
///
/// @param step, numbers  as in agreement().
inline void check_hashes(const std::vector<MemberHashes>& hashes, const MeshShape& shape, std::int64_t step,
                         const std::vector<int>& numbers) {
  constexpr std::array<const char*, 3> names = {"inputs", "targets", "extras"};
  for (std::size_t i = 0; i < names.size(); ++i) {
    std::vector<int> firsts(shape.data, -1);  // by replica
    for (int rank = 0; rank < std::ssize(hashes); ++rank) {
      if (!hashes[rank][i]) continue;
      int& first = firsts[shape.replica_of(rank)];
      if (first < 0) first = rank;
      DUALPIPE_CHECK(hashes[rank][i] == hashes[first][i], other_batch(names[i], numbers[rank], numbers[first], step));
    }
  }
}

/// Collective: the end of a step, which is over on all ranks or on none; see Communicator::commit(). Whatever has
/// failed on this rank's device must have been found before.
///
/// @param communicator  over the ranks of all replicas.
/// @param finding       which gradients of this rank are not finite.
inline StepVote vote(Communicator& communicator, const RunOutputs& outputs, const MicroBatchCount& count,
                     const MemberHashes& hashes, const std::string& finding = {}) {
  Tensors values;
  std::vector<BallotLoss> losses;
  for (const auto& [micro_batch, loss] : outputs.losses) {
    values.push_back(loss.reshape({}).to(at::kDouble));
    losses.push_back({.micro_batch = count.number(micro_batch)});
  }
  if (!values.empty()) {
    const at::Tensor on_host = at::stack(values).cpu();
    for (std::size_t i = 0; i < losses.size(); ++i) losses[i].loss = on_host.const_data_ptr<double>()[i];
  }
  at::Tensor sums;
  if (!outputs.metrics.empty() || !outputs.added_losses.empty())
    sums = sums_of(outputs, count, communicator.device()).cpu();
  at::Tensor all = at::zeros({count.all()}, at::kDouble), all_sums = at::zeros({count.num_sums()}, at::kDouble);
  return unpacked(communicator.commit(packed_ballot(hashes, outputs, losses, sums, finding)), communicator.size(),
                  std::move(all), std::move(all_sums));
}

/// As vote(), but the hosts do not wait for their devices.
///
/// @param num_infinite  how many gradients of this rank are not finite, float64 on its device; undefined: none is.
/// @param end           gets what is over when the device has finished the step. Then the losses hold, and behind them
///                      is one element more: num_infinite of all ranks.
inline StepVote vote_ahead(Communicator& communicator, const RunOutputs& outputs, const MicroBatchCount& count,
                           const MemberHashes& hashes, const at::Tensor& num_infinite, Pending& end) {
  at::Tensor numbers = at::zeros({count.all() + 1}, at::device(communicator.device()).dtype(at::kDouble));
  for (const auto& [micro_batch, loss] : outputs.losses) numbers[count.number(micro_batch)].copy_(loss.reshape({}));
  if (num_infinite.defined()) numbers[count.all()].copy_(num_infinite);
  const at::Tensor sums = sums_of(outputs, count, communicator.device());
  communicator.all_reduce({numbers, sums}).wait();
  at::Tensor on_host = numbers.to(at::kCPU, /*non_blocking=*/true);
  at::Tensor sums_on_host = sums.to(at::kCPU, /*non_blocking=*/true);
  end = communicator.fence();
  StepVote result = unpacked(communicator.commit(packed_ballot(hashes, outputs, {}, {})), communicator.size(),
                             at::empty({0}, at::kDouble), at::empty({0}, at::kDouble));
  result.losses = std::move(on_host);
  result.sums = std::move(sums_on_host);
  return result;
}

}  // namespace dualpipe::detail
