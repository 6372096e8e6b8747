#pragma once

#include "dualpipe/detail/pipeline/call_statement.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <numeric>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"

namespace dualpipe::detail {

/// By CallStatement::Call.
inline constexpr std::array call_names{"step()",
                                       "evaluate()",
                                       "predict()",
                                       "predict() for all ranks",
                                       "broadcast_batch()",
                                       "clip_grad_norm_()",
                                       "ShardedOptimizer::step()",
                                       "broadcast_parameters()"};

inline const char* call_name(CallStatement::Call call) { return call_names.at(static_cast<std::size_t>(call)); }

constexpr std::int64_t min_statement = 18;  // numbers, of a rank without parameters

/// A statement as numbers, without the text of its finding.
inline at::Tensor packed_statement(const CallStatement& statement) {
  std::vector<std::int64_t> numbers{
      CallStatement::mark,        static_cast<std::int64_t>(statement.call), statement.finding.empty() ? 0 : 1,
      statement.observed ? 1 : 0, statement.input_gradients ? 1 : 0,         statement.step,
      statement.num_micro_batches};
  for (const CallStatement::Part* part : {&statement.inputs, &statement.targets, &statement.extras})
    numbers.insert(numbers.end(),
                   {part->needed ? 1 : 0, part->passed ? 1 : 0, static_cast<std::int64_t>(part->digest)});
  numbers.push_back(static_cast<std::int64_t>(statement.trainable.size()));
  for (const auto& [group, digest] : statement.trainable)
    numbers.insert(numbers.end(), {group, static_cast<std::int64_t>(digest)});
  numbers.push_back(static_cast<std::int64_t>(statement.weights.size()));
  for (const double weight : statement.weights) numbers.push_back(std::bit_cast<std::int64_t>(weight));
  numbers.insert(numbers.end(), statement.sizes.begin(), statement.sizes.end());

  const auto count = static_cast<std::int64_t>(numbers.size());
  at::Tensor packed = at::empty({count}, at::kLong);
  std::copy(numbers.begin(), numbers.end(), packed.mutable_data_ptr<std::int64_t>());
  return packed;
}

/// The reverse. Another rank may have sent anything.
///
/// @param finding  whether there is one.
/// @return         whether it is a statement.
inline bool unpack_statement(const at::Tensor& packed, CallStatement& statement, bool& finding) {
  if (packed.scalar_type() != at::kLong || packed.numel() < min_statement || !packed.is_contiguous()) return false;
  const auto* next = packed.const_data_ptr<std::int64_t>();
  const auto* const end = next + packed.numel();
  if (*next++ != CallStatement::mark) return false;
  const std::int64_t call = *next++;
  if (call < 0 || call >= std::ssize(call_names)) return false;
  statement.call = static_cast<CallStatement::Call>(call);
  finding = *next++ != 0;
  statement.observed = *next++ != 0;
  statement.input_gradients = *next++ != 0;
  statement.step = *next++;
  statement.num_micro_batches = *next++;
  for (CallStatement::Part* part : {&statement.inputs, &statement.targets, &statement.extras}) {
    part->needed = *next++ != 0;
    part->passed = *next++ != 0;
    part->digest = static_cast<std::uint64_t>(*next++);
  }
  std::int64_t count = *next++;
  if (count < 0 || count > (end - next - 1) / 2) return false;  // behind them comes the number of weights
  for (; count > 0; --count) {
    const int group = static_cast<int>(*next++);
    statement.trainable[group] = static_cast<std::uint64_t>(*next++);
  }
  count = *next++;
  if (count < 0 || count > end - next) return false;
  for (; count > 0; --count) statement.weights.push_back(std::bit_cast<double>(*next++));
  statement.sizes.assign(next, end);
  return true;
}

/// The packed statements of all ranks, by rank.
inline Tensors gather_statements(Communicator& communicator, const CallStatement& mine) {
  try {
    return communicator.control().all_gather(packed_statement(mine)).take();
  } catch (const CommError& error) {
    throw CommError(error.origin_rank(), error.operation(),
                    str(error.what(), "; this rank had called ", call_name(mine.call)));
  }
}

std::vector<CallStatement> exchange_statements(Communicator& communicator, const CallStatement& mine) {
  const Tensors packed = gather_statements(communicator, mine);
  std::vector<CallStatement> statements(packed.size());
  bool any_finding = false;
  for (std::size_t rank = 0; rank < packed.size(); ++rank) {
    bool finding = false;
    DUALPIPE_CHECK(unpack_statement(packed[rank], statements[rank], finding), "rank ",
                   communicator.world_rank(communicator.rank()), " calls ", call_name(mine.call), ", but rank ",
                   communicator.world_rank(static_cast<int>(rank)),
                   " does something else with the communicator, as making a DualPipe or calling all_gather(); all "
                   "ranks call the same in the same order");
    any_finding = any_finding || finding;
  }
  if (!any_finding) return statements;
  std::vector<std::string> findings = all_gather_text(communicator, mine.finding);
  for (std::size_t rank = 0; rank < findings.size(); ++rank) statements[rank].finding = std::move(findings[rank]);
  return statements;
}

std::string other_batch(const char* name, int rank, int first, std::int64_t step) {
  const std::string when =
      step < 0 ? "" : str(" of step ", step + 1, step > 0 ? ", those of the steps before were alike" : "");
  return str("ranks disagree about the batch", when, ": Batch::", name, " of rank ", rank,
             " has other sizes or values, or others that require grad, than that of rank ", first,
             "; all ranks that pass it must pass the same, since one feeds the inputs and another computes the loss. ",
             step > 0
                 ? "Often a loader shuffles with LibTorch's default generator, which one rank has used for something "
                   "else, as dropout does: give the loader a generator of its own, seeded alike on all ranks"
                 : "Seed what loads and shuffles the data alike on every rank");
}

/// Ranks of a replica that pass a member of the batch pass the same, and where one does, all do that need it.
inline void check_part(const std::vector<CallStatement>& statements, const MeshShape& shape, int replica,
                       CallStatement::Part CallStatement::* member, const char* name, const char* use,
                       std::int64_t step, const std::vector<int>& numbers) {
  int first = -1;
  for (int rank = 0; rank < static_cast<int>(statements.size()); ++rank) {
    if (shape.replica_of(rank) != replica) continue;
    const CallStatement::Part& part = statements[rank].*member;
    if (!part.passed) continue;
    if (first < 0) first = rank;
    DUALPIPE_CHECK(part.digest == (statements[first].*member).digest,
                   other_batch(name, numbers[rank], numbers[first], step));
  }
  for (int rank = 0; rank < static_cast<int>(statements.size()) && first >= 0; ++rank) {
    if (shape.replica_of(rank) != replica) continue;
    const CallStatement::Part& part = statements[rank].*member;
    DUALPIPE_CHECK(part.passed || !part.needed, "rank ", numbers[rank], " got a batch without ", name, ", but it ", use,
                   " of some micro-batches, and rank ", numbers[first], " passes them");
  }
}

/// The weights of all replicas, in each of which the ranks that pass any pass the same.
inline std::vector<double> agreed_weights(const std::vector<CallStatement>& statements, const MeshShape& shape,
                                          std::int64_t num_micro_batches, const std::vector<int>& numbers) {
  std::vector<int> firsts(shape.data, -1);  // by replica: the first rank with weights
  for (int rank = 0; rank < static_cast<int>(statements.size()); ++rank) {
    const std::vector<double>& mine = statements[rank].weights;
    if (mine.empty()) continue;
    DUALPIPE_CHECK(static_cast<std::int64_t>(mine.size()) == num_micro_batches, "Batch::weights of rank ",
                   numbers[rank], " has ", mine.size(), " entries, but there are ", num_micro_batches,
                   " micro-batches; give one for each, or none");
    int& first = firsts[shape.replica_of(rank)];
    if (first < 0) first = rank;
    const std::vector<double>& expected = statements[first].weights;
    for (std::size_t m = 0; m < mine.size(); ++m)
      DUALPIPE_CHECK(mine[m] == expected[m], "ranks disagree about the batch: Batch::weights[", m, "] of rank ",
                     numbers[rank], " is ", mine[m], ", that of rank ", numbers[first], " is ", expected[m]);
  }
  std::vector<double> all;
  const auto some = std::find_if(firsts.begin(), firsts.end(), [](int first) { return first >= 0; });
  if (some == firsts.end()) return all;
  for (int replica = 0; replica < shape.data; ++replica) {
    DUALPIPE_CHECK(firsts[replica] >= 0, "rank ", numbers[*some],
                   " passes Batch::weights, but in another replica of the pipeline no rank does; pass them in each "
                   "replica, or in none");
    const std::vector<double>& weights = statements[firsts[replica]].weights;
    all.insert(all.end(), weights.begin(), weights.end());
  }
  const double sum = std::accumulate(all.begin(), all.end(), 0.0);
  DUALPIPE_CHECK(sum > 0 && std::isfinite(sum), "the sum of Batch::weights over all replicas is ", sum,
                 ", but must be positive and finite: without any weight there is nothing to average");
  return all;
}

CallAgreement agreement(const std::vector<CallStatement>& statements, const MeshShape& shape, int replica,
                        std::int64_t step, const std::vector<int>& numbers) {
  std::vector<std::string> findings;
  for (const CallStatement& statement : statements) findings.push_back(statement.finding);
  throw_findings(findings, numbers);

  CallAgreement agreed;
  int counted = -1;
  std::map<int, std::pair<int, std::uint64_t>> trainable;  // by group: the first rank of it, and what that says
  for (int rank = 0; rank < static_cast<int>(statements.size()); ++rank) {
    const CallStatement& statement = statements[rank];
    DUALPIPE_CHECK(statement.call == statements[0].call, "ranks call different methods: rank ", numbers[0], " calls ",
                   call_name(statements[0].call), ", rank ", numbers[rank], " calls ", call_name(statement.call),
                   "; all ranks call them in the same order");
    DUALPIPE_CHECK(statement.step == statements[0].step, "rank ", numbers[0], " has ", statements[0].step,
                   " steps behind it, rank ", numbers[rank], " has ", statement.step,
                   "; all ranks call set_step() with the same number");
    agreed.observed = agreed.observed || statement.observed;
    agreed.input_gradients = agreed.input_gradients || statement.input_gradients;
    if (statement.num_micro_batches > 0) {
      if (counted < 0) counted = rank;
      DUALPIPE_CHECK(statement.num_micro_batches == statements[counted].num_micro_batches,
                     "ranks disagree about the batch: that of rank ", numbers[counted], " has ",
                     statements[counted].num_micro_batches, " micro-batches, that of rank ", numbers[rank], " has ",
                     statement.num_micro_batches);
      agreed.num_micro_batches = statement.num_micro_batches;
    }
    if (agreed.sizes.empty() && shape.replica_of(rank) == replica) agreed.sizes = statement.sizes;
    for (const auto& [group, digest] : statement.trainable) {
      const auto& [other, expected] = trainable.try_emplace(group, rank, digest).first->second;
      DUALPIPE_CHECK(digest == expected, "ranks ", numbers[other], " and ", numbers[rank],
                     " hold the same stages, but other parameters of them require grad; freeze a stage on all ranks "
                     "that hold it");
    }
  }
  agreed.weights = agreed_weights(statements, shape, agreed.num_micro_batches, numbers);
  for (int each = 0; each < shape.data; ++each) {
    check_part(statements, shape, each, &CallStatement::inputs, "inputs", "feeds the first stage", step, numbers);
    check_part(statements, shape, each, &CallStatement::targets, "targets", "computes the loss", step, numbers);
    check_part(statements, shape, each, &CallStatement::extras, "extras", "uses them", step, numbers);
  }
  return agreed;
}

}  // namespace dualpipe::detail
