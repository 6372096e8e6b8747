#pragma once

#include <c10/util/Exception.h>

#include <exception>
#include <string>

namespace dualpipe::detail {

/// What an exception says, without the backtrace that LibTorch's own carry.
inline std::string message_of(const std::exception& error) {
  const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
  return torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
}

/// The same of whatever is being handled, also where it is no std::exception. Never empty.
inline std::string current_error_text() {
  const std::string foreign = "an exception that is no std::exception";
  try {
    throw;
  } catch (const std::exception& error) {
    const std::string text = message_of(error);
    return text.empty() ? "an exception without a text" : text;
  } catch (const std::string& thrown) {
    return foreign + ": " + thrown;
  } catch (const char* thrown) {
    return foreign + ": " + thrown;
  } catch (int thrown) {
    return foreign + ": " + std::to_string(thrown);
  } catch (...) {
    return foreign;
  }
}

}  // namespace dualpipe::detail
