#pragma once

#include <CLI/CLI.hpp>
#include <optional>
#include <string>
#include <vector>

#include "dualpipe/planner/cost_model.hpp"
#include "dualpipe/schedule/simulate.hpp"

// What schedules cost, on the command line.
namespace dualpipe::planner::tool {

struct CostOptions {
  std::string costs = "1,2,1,3";  ///< durations, or the path of a costs file or of a trace
  std::optional<double> send;
  std::string ready;                      ///< of a pair's results: activation,gradient
  std::string memory;                     ///< activation,weight part,state
  std::vector<double> parameters;         ///< of each stage
  std::optional<double> parameter_bytes;  ///< of state, for each parameter
  std::optional<double> recompute;        ///< what stays of an activation
  bool shard_optimizer = false;
  double optimizer_share = 12.0 / 18;  ///< of the state
  int replicas = 1;
  std::vector<std::string> stage_scale, boundary_send, links, stragglers;  ///< each PLACE:NUMBER

  /// For a model cut into `num_stages` stages; the ranks named are below `num_ranks`. A file is read once; notes of
  /// what a trace did not show go to standard error.
  ///
  /// @throws InvalidArgument  a value or a file that is wrong, a stage or rank that is not there.
  /// @throws CLI::ValidationError  what has not the form that the option takes.
  CostModel of(int num_ranks, int num_stages) const;
  /// For that schedule.
  CostModel of(const Schedule& schedule) const;
  /// How many stages a file lists costs of; 0: none, all are alike.
  int listed_stages() const;

 private:
  const CostModel& base() const;  // what --costs says alone
  mutable std::optional<CostModel> base_;
};

/// --costs, --send, --stage-scale and so on. Binds to `costs`, which must live as long as the command does.
void add_costs(CLI::App& command, CostOptions& costs);
/// --memory
void add_memory(CLI::App& command, CostOptions& costs);
/// --recompute
void add_recompute(CLI::App& command, CostOptions& costs);

/// --shard-optimizer, --optimizer-share, --replicas
void add_sharding(CLI::App& command, CostOptions& costs);
/// What they say, as a line; empty where the optimizer is not sharded.
std::string sharding_text(const MemoryCosts& memory);

/// A costs file, or the costs measured from a trace, with notes on standard error.
CostModel read_cost_file(const std::string& path);

/// "F=1 B=2 W=1 pair=3 send=0, results published early"; where costs are uneven, from the least to the most.
std::string describe(const Costs& costs, Publish publish);

}  // namespace dualpipe::planner::tool
