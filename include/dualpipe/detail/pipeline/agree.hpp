#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <string>
#include <vector>

#include "dualpipe/comm/communicator.hpp"

namespace dualpipe {

/// What an exception says, without the backtrace that LibTorch's own carry.
inline std::string message_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

/// Collective: every rank's text, by rank. The hosts' own business: waits for no device.
inline std::vector<std::string> all_gather_text(Communicator& communicator, const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  std::memcpy(bytes.mutable_data_ptr(), text.data(), text.size());
  std::vector<std::string> texts;
  for (const at::Tensor& each : communicator.control().all_gather(bytes).take())
    texts.emplace_back(static_cast<const char*>(each.const_data_ptr()), each.numel());
  return texts;
}

/// Collective: throws on every rank what any rank found wrong, before anything else is sent; the communicator stays
/// usable.
///
/// @param finding  what this rank found, empty: nothing.
/// @throws InvalidArgument  the findings: one text where all ranks found the same, else each with its rank.
inline void agree_that_fine(Communicator& communicator, const std::string& finding) {
  const std::vector<std::string> findings = all_gather_text(communicator, finding);
  bool same = true;
  std::string text;
  for (std::size_t rank = 0; rank < findings.size(); ++rank) {
    same = same && findings[rank] == findings[0];
    if (!findings[rank].empty()) text += detail::str(text.empty() ? "" : "\n", "rank ", rank, ": ", findings[rank]);
  }
  if (!text.empty()) throw InvalidArgument(same ? findings[0] : text);
}

/// Collective: the same for something that all ranks must say alike.
///
/// @param what       names it, as in "options".
/// @param statement  what this rank says.
inline void agree_on(Communicator& communicator, const std::string& what, const std::string& statement) {
  const std::vector<std::string> statements = all_gather_text(communicator, statement);
  for (std::size_t rank = 1; rank < statements.size(); ++rank)
    if (statements[rank] != statements[0])
      throw InvalidArgument(detail::str("ranks disagree about the ", what, ":\n  rank 0: ", statements[0], "\n  rank ",
                                        rank, ": ", statements[rank]));
}

}  // namespace dualpipe
