#pragma once

#include "dualpipe/schedule/op.hpp"

#include <charconv>
#include <system_error>

#include "dualpipe/detail/schedule/quoted_op.hpp"
#include "dualpipe/error.hpp"

namespace dualpipe::detail {

inline constexpr std::string_view pair_suffix = ")OVERLAP_F_B";

inline bool is_digit(char c) { return c >= '0' && c <= '9'; }

// Takes a number off the front of `rest`.
inline int take_op_number(std::string_view& rest, std::string_view text, const char* what) {
  DUALPIPE_CHECK(!rest.empty() && is_digit(rest.front()), quoted_op(text), " has no ", what,
                 " where one belongs; an op is <stage><F|I|W|B><micro-batch>, as in 2F0");
  int value = 0;
  const auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), value);
  DUALPIPE_CHECK(error == std::errc{}, quoted_op(text), " has a ", what, " that is too large");
  rest.remove_prefix(end - rest.data());
  return value;
}

}  // namespace dualpipe::detail

namespace dualpipe {

std::string to_string(const Op& op) {
  return std::to_string(op.stage) + static_cast<char>(op.pass) + std::to_string(op.micro_batch);
}

std::string to_string(const Step& step) {
  if (!step.overlapped) return to_string(step.op);
  std::string text = "(";
  text += to_string(step.op);
  text += ';';
  text += to_string(*step.overlapped);
  text += detail::pair_suffix;
  return text;
}

Op parse_op(std::string_view text) {
  std::string_view rest = text;
  Op op;
  op.stage = detail::take_op_number(rest, text, "stage");
  DUALPIPE_CHECK(!rest.empty(), detail::quoted_op(text),
                 " ends before its pass; an op is <stage><F|I|W|B><micro-batch>, as in 2F0");
  switch (rest.front()) {
    case 'F':
    case 'I':
    case 'W':
    case 'B':
      op.pass = static_cast<Pass>(rest.front());
      break;
    default:
      throw InvalidArgument(detail::str(detail::quoted_op(text),
                                        " has no pass that is known here: F forward, I input gradient, W weight",
                                        " gradient, B whole backward"));
  }
  rest.remove_prefix(1);
  op.micro_batch = detail::take_op_number(rest, text, "micro-batch");
  DUALPIPE_CHECK(rest.empty(), detail::quoted_op(text), " goes on after its micro-batch");
  return op;
}

Step parse_step(std::string_view text) {
  if (text.empty() || text.front() != '(') return {parse_op(text), std::nullopt};
  DUALPIPE_CHECK(text.ends_with(detail::pair_suffix), detail::quoted_op(text), " opens a pair that does not end in ",
                 detail::pair_suffix, "; a pair is (0F7;7B3)OVERLAP_F_B");
  const std::string_view inside = text.substr(1, text.size() - 1 - detail::pair_suffix.size());
  const std::size_t middle = inside.find(';');
  DUALPIPE_CHECK(middle != std::string_view::npos && inside.find(';', middle + 1) == std::string_view::npos,
                 detail::quoted_op(text), " is not a pair of two ops; a pair is (0F7;7B3)OVERLAP_F_B");
  return {parse_op(inside.substr(0, middle)), parse_op(inside.substr(middle + 1))};
}

}  // namespace dualpipe
