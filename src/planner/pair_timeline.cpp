#include "dualpipe/planner/pair_timeline.hpp"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstddef>

#include "dualpipe/error.hpp"

namespace dualpipe::planner {
namespace {

constexpr double compute_duration = 1, collective_duration = 1.5;  // the proportion that pair_order supposes

std::string_view trimmed(std::string_view text) {
  constexpr std::string_view blanks = " \t";
  const std::size_t first = text.find_first_not_of(blanks);
  return first == std::string_view::npos ? "" : text.substr(first, text.find_last_not_of(blanks) - first + 1);
}

ChainNode parse_node(std::string_view text) {
  const auto fail = [&](const auto&... what) {
    throw InvalidArgument(detail::str("node \"", text, "\" of a chain: ", what...,
                                      "; expected a name, then @ if it communicates, then =DURATION if you like"));
  };
  ChainNode node;
  std::string_view rest = trimmed(text);
  double duration = 0;
  if (const std::size_t equals = rest.find('='); equals != std::string_view::npos) {
    const std::string_view number = trimmed(rest.substr(equals + 1));
    const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), duration);
    if (error != std::errc() || end != number.data() + number.size() || !std::isfinite(duration) || duration <= 0)
      fail("the duration \"", number, "\" is no number above 0");
    rest = trimmed(rest.substr(0, equals));
  }
  if (rest.ends_with('@')) {
    node.communicates = true;
    rest = trimmed(rest.substr(0, rest.size() - 1));
  }
  if (rest.empty()) fail("it has no name");
  if (rest.find_first_of("@[]") != std::string_view::npos) fail("a name holds none of @ [ ]");
  node.name = rest;
  node.duration = duration > 0 ? duration : node.communicates ? collective_duration : compute_duration;
  return node;
}

}  // namespace

Chain parse_chain(std::string_view text) {
  text = trimmed(text);
  Chain chain;
  if (text.empty() || text == "none") return chain;
  if (text.find_first_not_of("CX") == std::string_view::npos) {
    for (const char letter : text)
      chain.push_back({letter + std::to_string(chain.size()), letter == 'X',
                       letter == 'X' ? collective_duration : compute_duration});
    return chain;
  }
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    chain.push_back(parse_node(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return chain;
}

std::string structure(const Chain& chain) {
  std::string letters;
  for (const ChainNode& node : chain) letters += node.communicates ? 'X' : 'C';
  return letters;
}

std::vector<std::string> names(const Chain& chain) {
  std::vector<std::string> result;
  for (const ChainNode& node : chain) result.push_back(node.name);
  return result;
}

Timeline pair_timeline(const Chain& forward, const Chain& backward, const std::vector<PairOp>& order) {
  DUALPIPE_CHECK(!forward.empty() || !backward.empty(), "a pair of two empty chains has nothing to do");
  launch_order(structure(forward), structure(backward), order);  // for its check

  const bool weights =
      std::any_of(order.begin(), order.end(), [](const PairOp& op) { return op.side == PairSide::weight; });
  const Op forward_op{Pass::Forward, 0, 1};
  const Op backward_op{weights ? Pass::Backward : Pass::BackwardInput, 0, 0};
  Timeline timeline{.name = "pair", .num_ranks = 1, .intervals = {}};
  double host = 0, network = 0;
  std::array<double, 2> input_at{};  // of the forward, of the backward: when its last collective ends
  for (const PairOp& op : order) {
    const ChainNode& node = (op.side == PairSide::forward ? forward : backward)[op.node];
    const auto record = [&](Lane lane, const Op& what, double begin) {
      timeline.intervals.push_back({0, lane, {what, {}}, begin, begin + node.duration, node.name});
      return begin + node.duration;
    };
    if (op.side == PairSide::weight) {
      host = record(Lane::node, {Pass::BackwardWeight, 0, 0}, host);
      continue;
    }
    double& input = input_at[op.side == PairSide::backward];
    host = std::max(host, input);
    if (node.communicates)
      input = network =
          record(Lane::collective, op.side == PairSide::forward ? forward_op : backward_op, std::max(host, network));
    else
      host = record(Lane::node, op.side == PairSide::forward ? forward_op : Op{Pass::BackwardInput, 0, 0}, host);
  }
  Step step{forward.empty() ? backward_op : forward_op, {}};
  if (!forward.empty() && !backward.empty()) step.overlapped = backward_op;
  timeline.intervals.insert(timeline.intervals.begin(), {0, Lane::compute, step, 0, std::max(host, network)});
  return timeline;
}

}  // namespace dualpipe::planner
