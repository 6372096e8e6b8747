#pragma once

#include "dualpipe/detail/pipeline/training_plan.hpp"

#include <algorithm>
#include <filesystem>
#include <sstream>
#include <system_error>
#include <utility>

#include "dualpipe/detail/comm/agree.hpp"
#include "dualpipe/detail/files.hpp"
#include "dualpipe/detail/pipeline/buffers.hpp"
#include "dualpipe/detail/pipeline/digest.hpp"
#include "dualpipe/detail/pipeline/flight_recorder.hpp"
#include "dualpipe/detail/pipeline/merge_outputs.hpp"
#include "dualpipe/schedule/check.hpp"
#include "dualpipe/schedule/generate.hpp"
#include "dualpipe/schedule/load.hpp"

namespace dualpipe::detail {

std::shared_ptr<const Plan> training_plan(const DualPipeOptions& options, Communicator& pipeline, int num_replicas) {
  const int num_ranks = pipeline.size();
  DUALPIPE_CHECK(options.num_micro_batches >= 1, "num_micro_batches must be at least 1, got ",
                 options.num_micro_batches);
  DUALPIPE_CHECK(options.num_ranks == 0 || options.num_ranks == num_ranks, "num_ranks is ", options.num_ranks,
                 " but the communicator has ", num_ranks, " ranks; start ", options.num_ranks,
                 " of them or correct num_ranks");
  DUALPIPE_CHECK(options.batch_dim >= 0, "batch_dim must not be negative, got ", options.batch_dim);
  DUALPIPE_CHECK(options.compare_replicas_every >= 0, "compare_replicas_every must not be negative, got ",
                 options.compare_replicas_every);
  for (const auto* splits : {&options.split.inputs, &options.split.targets, &options.split.extras})
    for (const Split& split : *splits)
      DUALPIPE_CHECK(split.dim >= 0, "split: dim must not be negative, got ", split.dim);
  for (const Merge& merge : options.merge_outputs)
    DUALPIPE_CHECK(merge.dim >= 0, "merge_outputs: dim must not be negative, got ", merge.dim);
  const ScheduleSpec spec{options.schedule, num_ranks, options.num_micro_batches, options.chunks_per_rank};
  const auto make = [&] {
    Schedule schedule = load_schedule(spec);
    check(schedule);
    return make_plan(std::move(schedule), options.publish, {}, num_replicas);
  };
  std::string key = str(spec.kind, " with ", spec.num_ranks, " ranks, ", spec.num_micro_batches, " micro-batches, ",
                        spec.chunks_per_rank, " chunks, ", options.publish == Publish::early ? "early" : "atomic",
                        ", replicas: ", num_replicas);
  std::error_code ignored;
  if (!is_schedule_kind(spec.kind) && std::filesystem::exists(spec.kind, ignored)) {
    Digest digest;  // a file may have changed
    digest.add(read_file(spec.kind));
    key += str(", checksum ", digest.value());
  }
  return plan_of_rank(pipeline, key, make);
}

std::shared_ptr<const Plan> communicating_plan(const Plan& plan, Communicator& pipeline, int num_replicas) {
  return plan_of_rank(pipeline, plan.key + ", with collectives",
                      [&] { return make_plan(plan.schedule, plan.publish, communicating_pair, num_replicas); });
}

int ordered_micro_batches(const Plan& plan, const DualPipeOptions& options, int num_micro_batches) {
  const Schedule& schedule = plan.schedule;
  if (!is_schedule_kind(options.schedule)) return schedule.num_micro_batches;
  return supported_micro_batches({options.schedule, static_cast<int>(schedule.ranks.size()), num_micro_batches});
}

std::shared_ptr<const Plan> resized_plan(const Plan& plan, const DualPipeOptions& options, int num_micro_batches,
                                         Communicator& pipeline, int num_replicas, bool communicates) {
  return plan_of_rank(pipeline, str("training ", num_micro_batches, " of ", plan.key), [&] {
    const int ordered = ordered_micro_batches(plan, options, num_micro_batches);
    const bool is_kind = is_schedule_kind(options.schedule);
    DUALPIPE_CHECK(is_kind || num_micro_batches <= ordered, "the schedule in ", options.schedule, " is for ", ordered,
                   " micro-batches and takes fewer, but not ", num_micro_batches,
                   "; a kind makes its order for any number");
    const Schedule larger =
        is_kind ? make_schedule({options.schedule, pipeline.size(), ordered, options.chunks_per_rank}) : plan.schedule;
    Schedule schedule = with_fewer(larger, num_micro_batches);
    check(schedule);
    return make_plan(std::move(schedule), plan.publish, communicates ? communicating_pair : PairReady{}, num_replicas,
                     &plan.schedule);
  });
}

inline std::string split_text(const std::vector<Split>& splits) {
  std::string text;
  for (const Split& split : splits) {
    if (!text.empty()) text += ", ";
    if (split.how == Split::How::chunk) text += str("chunk along dimension ", split.dim);
    if (split.how == Split::How::whole) text += "whole";
    if (split.how == Split::How::list) text += "list";
  }
  return "[" + text + "]";
}

std::string describe(const DualPipeOptions& options, const Plan& plan) {
  std::string merges;
  for (const Merge& merge : options.merge_outputs) merges += (merges.empty() ? "" : ", ") + merge_text(merge);
  std::string buffers;
  for (const auto& [name, reduction] : options.buffers)
    buffers += str(buffers.empty() ? "" : ", ", name, " ", name_of(reduction));
  return str("num_micro_batches ", options.num_micro_batches, ", schedule ", options.schedule, " (checksum ",
             plan.checksum, "), publish ", options.publish == Publish::early ? "early" : "atomic", ", loss_reduction ",
             options.loss_reduction == LossReduction::mean ? "mean" : "sum", ", gradient_dtype ",
             options.gradient_dtype == GradientDtype::float32 ? "float32" : "parameter", ", on_non_finite ",
             options.on_non_finite == OnNonFinite::error  ? "error"
             : options.on_non_finite == OnNonFinite::skip ? "skip"
                                                          : "keep",
             ", batch_dim ", options.batch_dim, ", split inputs ", split_text(options.split.inputs), ", targets ",
             split_text(options.split.targets), ", extras ", split_text(options.split.extras), ", merge_outputs [",
             merges, "], compare_replicas_every ", options.compare_replicas_every, ", buffers [", buffers, "], seed ",
             options.seed ? std::to_string(*options.seed) : "none", options.shard_optimizer ? ", shard_optimizer" : "");
}

StageTraits traits_of_all(Communicator& communicator, const std::map<int, Stage>& stages) {
  StageTraits traits;
  for (const auto& [number, stage] : stages) {
    if (stage.communicates()) traits.communicate = true;
    if (stage.has_data_dependent_shapes()) traits.data_dependent_from = std::min(traits.data_dependent_from, number);
  }
  const std::string mine = str(traits.communicate ? 1 : 0, ' ', traits.data_dependent_from, ' ', wall_clock_ns());
  for (const std::string& text : all_gather_text(communicator, mine)) {
    std::istringstream words(text);
    StageTraits theirs;
    words >> theirs.communicate >> theirs.data_dependent_from >> theirs.run;
    if (traits.run == 0) traits.run = theirs.run;
    traits.communicate = traits.communicate || theirs.communicate;
    traits.data_dependent_from = std::min(traits.data_dependent_from, theirs.data_dependent_from);
  }
  return traits;
}

}  // namespace dualpipe::detail
