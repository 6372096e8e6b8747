#include "dualpipe/launch/world.hpp"

#include <algorithm>
#include <charconv>
#include <string_view>
#include <system_error>

#include "dualpipe/error.hpp"
#include "launch/environment.hpp"
#include "launch/secret.hpp"

namespace dualpipe {
namespace {

constexpr long long max_ranks = 1'000'000;
constexpr long long max_port = 65535;

std::optional<long long> parse_integer(std::string_view text) {
  long long value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size()) return std::nullopt;
  return value;
}

/// A variable that is a whole number between `low` and `high`, or nullopt where it is unset.
std::optional<int> integer(const World::Lookup& lookup, const std::string& name, long long low, long long high,
                           std::string_view meaning) {
  const std::optional<std::string> text = lookup(name);
  if (!text) return std::nullopt;
  const std::optional<long long> value = parse_integer(*text);
  DUALPIPE_CHECK(value && *value >= low && *value <= high, name, "='", *text, "': ", meaning,
                 " must be a whole number from ", low, " to ", high, "; correct it, or unset it to use the default");
  return static_cast<int>(*value);
}

int required(const World::Lookup& lookup, const std::string& name, const std::string& because, long long low,
             long long high, std::string_view meaning) {
  const std::optional<int> value = integer(lookup, name, low, high, meaning);
  DUALPIPE_CHECK(value, name, " is not set although ", because,
                 ": set both, or start the program with dualpipe-run or torchrun");
  return *value;
}

void check_rank(const std::string& rank_name, int rank, const std::string& size_name, int size) {
  DUALPIPE_CHECK(rank < size, rank_name, "='", rank, "' with ", size_name, "='", size, "': ranks count from 0 to ",
                 size_name, " - 1, here 0 to ", size - 1);
}

/// MASTER_ADDR and MASTER_PORT, where set.
void read_master(const World::Lookup& lookup, World& world) {
  if (const std::optional<std::string> address = lookup("MASTER_ADDR")) {
    DUALPIPE_CHECK(!address->empty(), "MASTER_ADDR='': it must name the host of rank 0, or be unset for this host");
    world.master_address = *address;
  }
  world.master_port = integer(lookup, "MASTER_PORT", 1, max_port, "the port at which the ranks meet").value_or(0);
}

bool is_true(const std::optional<std::string>& text) { return text == "True" || text == "true" || text == "1"; }

World from_launcher(const World::Lookup& lookup) {
  World world;
  world.size = required(lookup, "WORLD_SIZE", "RANK is", 1, max_ranks, "the number of ranks");
  world.rank = required(lookup, "RANK", "WORLD_SIZE is", 0, max_ranks, "this process's rank");
  check_rank("RANK", world.rank, "WORLD_SIZE", world.size);

  world.local_size =
      integer(lookup, "LOCAL_WORLD_SIZE", 1, max_ranks, "the number of ranks on this host").value_or(world.size);
  DUALPIPE_CHECK(world.local_size <= world.size, "LOCAL_WORLD_SIZE='", world.local_size, "' with WORLD_SIZE='",
                 world.size, "': a host cannot hold more ranks than there are");
  world.local_rank = integer(lookup, "LOCAL_RANK", 0, max_ranks, "this process's rank on its host")
                         .value_or(world.rank % world.local_size);
  check_rank("LOCAL_RANK", world.local_rank, lookup("LOCAL_WORLD_SIZE") ? "LOCAL_WORLD_SIZE" : "WORLD_SIZE",
             world.local_size);

  read_master(lookup, world);
  DUALPIPE_CHECK(world.size == 1 || world.master_port != 0, "MASTER_PORT is not set although WORLD_SIZE='", world.size,
                 "': set it to a free port of the host of rank 0, the same on all ranks, or start the program with "
                 "dualpipe-run or torchrun");

  if (const std::optional<std::string> id = lookup("TORCHELASTIC_RUN_ID")) {
    // A restarted group meets at the same store as the one that failed, so the count belongs to the id.
    world.run_id = *id + "." + lookup("TORCHELASTIC_RESTART_COUNT").value_or("0");
    world.launcher_hosts_store = is_true(lookup("TORCHELASTIC_USE_AGENT_STORE"));
  } else {
    world.run_id = lookup("DUALPIPE_RUN_ID").value_or("");
  }
  world.error_file = detail::error_file(lookup);
  return world;
}

/// The first host of Slurm's compressed form: "node03" of "node[03-07,9],other".
std::string first_host(const std::string& name, const std::string& list) {
  std::string host;
  std::size_t at = 0;
  while (at < list.size() && list[at] != ',') {
    if (list[at] != '[') {
      host += list[at++];
      continue;
    }
    const std::size_t close = list.find(']', at);
    const std::string_view group =
        std::string_view(list).substr(at + 1, close == std::string::npos ? close : close - at - 1);
    const std::string_view first = group.substr(0, group.find_first_of(",-"));
    DUALPIPE_CHECK(close != std::string::npos && !first.empty(), name, "='", list,
                   "': expected a list of hosts such as node[03-07,9]; set MASTER_ADDR to the host of rank 0 instead");
    host += first;
    at = close + 1;
  }
  DUALPIPE_CHECK(!host.empty(), name, "='", list, "': no host in it; set MASTER_ADDR to the host of rank 0 instead");
  return host;
}

/// The number of tasks on node `node` of Slurm's compressed form: of "4(x2),3" nodes 0 and 1 hold four, node 2 three.
int tasks_on_node(const std::string& text, int node) {
  const auto malformed = [&] {
    return detail::str("SLURM_TASKS_PER_NODE='", text, "': expected counts such as 4(x2),3 with one for node ", node,
                       "; set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE instead");
  };
  std::string_view rest = text;
  long long nodes = 0;
  while (!rest.empty()) {
    std::string_view item = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), item.size() + 1));
    std::optional<long long> repeat = 1;
    if (const std::size_t open = item.find("(x"); open != std::string_view::npos) {
      DUALPIPE_CHECK(item.back() == ')', malformed());
      repeat = parse_integer(item.substr(open + 2, item.size() - open - 3));
      item = item.substr(0, open);
    }
    const std::optional<long long> count = parse_integer(item);
    DUALPIPE_CHECK(count && repeat && *count >= 1 && *count <= max_ranks && *repeat >= 1 && *repeat <= max_ranks,
                   malformed());
    nodes += *repeat;
    if (node < nodes) return static_cast<int>(*count);
  }
  throw InvalidArgument(malformed());
}

int slurm_local_size(const World::Lookup& lookup, int size) {
  if (const std::optional<int> fixed =
          integer(lookup, "SLURM_NTASKS_PER_NODE", 1, max_ranks, "the number of ranks on each host"))
    return std::min(*fixed, size);
  const std::optional<std::string> counts = lookup("SLURM_TASKS_PER_NODE");
  if (!counts) return size;
  return std::min(
      tasks_on_node(*counts, integer(lookup, "SLURM_NODEID", 0, max_ranks, "this host's number").value_or(0)), size);
}

/// Free on most clusters: below the range of ephemeral ports.
int port_of_job(std::string_view job, std::string_view step) {
  constexpr long long first = 15000;
  constexpr long long count = 15000;
  const long long id = parse_integer(job).value_or(0) * 7 + parse_integer(step).value_or(0);
  return static_cast<int>(first + id % count);
}

World from_slurm(const World::Lookup& lookup) {
  World world;
  world.rank = required(lookup, "SLURM_PROCID", "SLURM_NTASKS is", 0, max_ranks, "this process's rank");
  world.size = required(lookup, "SLURM_NTASKS", "SLURM_PROCID is", 1, max_ranks, "the number of ranks");
  check_rank("SLURM_PROCID", world.rank, "SLURM_NTASKS", world.size);
  world.local_size = slurm_local_size(lookup, world.size);
  world.local_rank = integer(lookup, "SLURM_LOCALID", 0, max_ranks, "this process's rank on its host")
                         .value_or(world.rank % world.local_size);
  check_rank("SLURM_LOCALID", world.local_rank, "ranks on this host", world.local_size);

  const std::string job = lookup("SLURM_JOB_ID").value_or("");
  const std::string step = lookup("SLURM_STEP_ID").value_or("0");
  if (!job.empty()) world.run_id = job + "." + step + "." + lookup("SLURM_RESTART_COUNT").value_or("0");

  read_master(lookup, world);
  if (world.size == 1) return world;
  if (!lookup("MASTER_ADDR")) {
    const std::string list_name = lookup("SLURM_STEP_NODELIST") ? "SLURM_STEP_NODELIST" : "SLURM_JOB_NODELIST";
    if (const std::optional<std::string> list = lookup(list_name))
      world.master_address = first_host(list_name, *list);
    else
      DUALPIPE_CHECK(world.local_size == world.size,
                     "neither MASTER_ADDR nor SLURM_JOB_NODELIST is set although SLURM_NTASKS='", world.size,
                     "' and only ", world.local_size, " of them are here: set MASTER_ADDR to the host of rank 0");
  }
  if (world.master_port == 0) {
    DUALPIPE_CHECK(parse_integer(job).value_or(-1) >= 0 && job.size() <= 15, "SLURM_JOB_ID='", job,
                   "' gives no port although SLURM_NTASKS='", world.size,
                   "': set MASTER_PORT to a free port of the host of rank 0, the same on all ranks");
    world.master_port = port_of_job(job, step);
  }
  return world;
}

}  // namespace

World World::from(const Lookup& lookup) {
  World world;
  if (lookup("RANK") || lookup("WORLD_SIZE"))
    world = from_launcher(lookup);
  else if (lookup("SLURM_PROCID"))
    world = from_slurm(lookup);
  else
    return world;
  constexpr const char* secret_file = "DUALPIPE_SECRET_FILE";
  if (const std::optional<std::string> path = lookup(secret_file))
    world.secret = detail::read_secret(secret_file, *path);
  return world;
}

World World::from_env() { return from(detail::variable); }

}  // namespace dualpipe
