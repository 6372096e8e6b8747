#include "tools/run/options.hpp"

#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <charconv>
#include <chrono>
#include <iostream>

namespace dualpipe::run {
namespace {

constexpr int kUsage = 2;
constexpr int kMaxRanksPerNode = 4096;
constexpr int kMaxNodes = 100'000;

/// "host:port" or "[::1]:port" into `options`.
void set_rendezvous(const std::string& text, Options& options) {
  const auto refuse = [&] {
    throw CLI::ValidationError(
        "--rendezvous",
        "expected HOST:PORT of node 0 with a port from 1 to 65535, as in host0:29500 or [fd00::1]:29500, got '" + text +
            "'");
  };
  const std::size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) refuse();
  std::string host = text.substr(0, colon);
  if (host.front() == '[' && host.back() == ']')
    host = host.substr(1, host.size() - 2);
  else if (host.find_first_of(":/ ") != std::string::npos)
    refuse();  // an address of IPv6 without brackets, or a URL
  int port = 0;
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data() + colon + 1, end, port);
  if (host.empty() || parsed.ec != std::errc{} || parsed.ptr != end || port < 1 || port > 65535) refuse();
  options.master_address = host;
  options.master_port = port;
}

/// CLI11's own range lets NaN pass.
CLI::Validator seconds() {
  constexpr double most = 86400;
  return {[](const std::string& text) {
            double value = 0;
            const bool fits = CLI::detail::lexical_cast(text, value) && value >= 0 && value <= most;
            return fits ? std::string()
                        : "must be from 0 to " + std::to_string(static_cast<int>(most)) + ", got " + text;
          },
          "SECONDS"};
}

/// Nodes of one run must agree on the id without having spoken to each other.
std::string default_run_id(const Options& options) {
  if (options.nodes > 1) return options.master_address + ":" + std::to_string(options.master_port);
  return std::to_string(std::chrono::system_clock::now().time_since_epoch().count()) + "." + std::to_string(::getpid());
}

}  // namespace

std::optional<Options> parse_command_line(int argc, const char* const* argv, int& exit_code) {
  Options options;
  std::string rendezvous;
  double wait_before_term = 3, grace = 5;
  bool no_prefix = false;

  CLI::App app{
      "Starts the ranks of a program and watches over them.\n"
      "Each rank finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its "
      "environment,\n"
      "and DUALPIPE_RUN_TERMINAL=1 where their output ends up on a terminal: a line that ends in a carriage return is\n"
      "overwritten there by the next.\n"
      "When one rank fails, the others of this node are ended. Those of other nodes learn of it by themselves, or,\n"
      "where they have not met that rank, from the launcher, which stays for up to 10 s to tell them. Which one "
      "failed\n"
      "first is what most ranks say that call dualpipe::report_failure, which writes to DUALPIPE_ERROR_FILE. The exit\n"
      "code is its own, 128 + signal when it was killed; that of the first failing rank of this node where it is on\n"
      "another node or had to be ended.\n"
      "On one node the ranks get a secret of this launch, by which they know each other, in the file "
      "DUALPIPE_SECRET_FILE.\n"
      "On several set that variable yourself, to a file with the same 16 to 4096 bytes on all nodes and mode 0600.\n"
      "Ranks inherit stdin (rank 0), stdout and stderr, no other open files.",
      "dualpipe-run"};
  app.footer(
      "PROGRAM and its arguments follow --, as in\n"
      "One machine:   dualpipe-run -n 8 -- ./train --steps 100\n"
      "Two machines:  dualpipe-run -n 8 --nnodes 2 --node-rank 0 --rendezvous host0:29500 -- ./train   (node rank 1 on "
      "the other)");
  app.prefix_command();
  app.add_option("-n,--ranks", options.ranks, "ranks on this node, the same on every node")
      ->required()
      ->check(CLI::Range(1, kMaxRanksPerNode));
  app.add_option("--nnodes", options.nodes, "nodes that take part")->check(CLI::Range(1, kMaxNodes));
  auto* node_rank = app.add_option("--node-rank", options.node_rank, "which of them this one is, from 0")
                        ->check(CLI::Range(0, kMaxNodes - 1));
  auto* meeting =
      app.add_option("--rendezvous", rendezvous, "HOST:PORT of node 0 where the ranks meet; needed with --nnodes");
  app.add_option("--run-id", options.run_id,
                 "tells runs that share a rendezvous apart; the same on every node, another one after a restart");
  app.add_option("--label", options.label, "text before each line of output, %r stands for the rank")
      ->capture_default_str();
  app.add_flag("--no-prefix", no_prefix, "leave the output as it is");
  app.add_option("--wait-before-term", wait_before_term,
                 "seconds from a failure to SIGTERM; none where all ranks that are left are stopped")
      ->capture_default_str()
      ->check(seconds());
  app.add_option("--grace", grace, "seconds from SIGTERM to SIGKILL; none where all ranks that are left are stopped")
      ->capture_default_str()
      ->check(seconds());
  app.add_flag("-q,--quiet", options.quiet, "say nothing but errors");

  // What follows "--" belongs to the program, whatever it looks like.
  const std::vector<std::string> all(argv + 1, argv + argc);
  const auto separator = std::find(all.begin(), all.end(), "--");
  std::vector<std::string> ours(all.begin(), separator);
  std::reverse(ours.begin(), ours.end());  // as CLI11 takes a vector
  try {
    app.parse(ours);
    const std::vector<std::string> rest = app.remaining();
    if (!rest.empty() && (rest.front().front() == '-' || separator != all.end()))
      throw CLI::ExtrasError({rest.front()});
    options.program = separator == all.end() ? rest : std::vector<std::string>(separator + 1, all.end());
    if (options.program.empty() || options.program.front().empty())
      throw CLI::ValidationError("PROGRAM", "name the program to run, as in: dualpipe-run -n 2 -- ./program");
    if (options.nodes > 1 && (meeting->empty() || node_rank->empty()))
      throw CLI::ValidationError("--nnodes", "several nodes need --node-rank and --rendezvous as well");
    if (options.nodes == 1 && options.node_rank > 0)
      throw CLI::ValidationError("--node-rank", "needs --nnodes, the number of nodes, as well");
    if (options.node_rank >= options.nodes)
      throw CLI::ValidationError("--node-rank", std::to_string(options.node_rank) + " with --nnodes " +
                                                    std::to_string(options.nodes) + ": nodes count from 0 to " +
                                                    std::to_string(options.nodes - 1));
    if (!meeting->empty()) set_rendezvous(rendezvous, options);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      exit_code = app.exit(error);  // prints the help
    } else {
      std::cerr << "dualpipe-run: " << error.what() << "\ndualpipe-run --help shows how it is used\n";
      exit_code = kUsage;
    }
    return std::nullopt;
  }
  options.prefix = !no_prefix;
  const auto duration = [](double seconds) {
    return std::chrono::milliseconds(static_cast<std::int64_t>(seconds * 1000));
  };
  options.wait_before_term = duration(wait_before_term);
  options.grace = duration(grace);
  if (options.run_id.empty()) options.run_id = default_run_id(options);
  return options;
}

}  // namespace dualpipe::run
