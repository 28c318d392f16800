// simt_report.h -- the findings of a launch as text, each once.
//
// Places in the code are written as "{pc:hex}", offsets into the kernel's library that Python turns
// into file and line.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

// printf into a string.
__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...)
{
    char buffer[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(buffer, sizeof buffer, format, arguments);
    va_end(arguments);
    return buffer;
}

static std::string place(uint32_t pc) { return text("{pc:%x}", pc); }

class Findings {
public:
    // Add a finding unless one with this key is there or there are enough.
    // The key keeps a mistake in a loop from filling the report.
    template <class Describe> void add(uint64_t key, Describe describe)
    {
        total_++;
        for (Entry& entry : entries_)
            if (entry.key == key) {
                entry.again = true;
                return;
            }
        if (entries_.size() < KEPT) entries_.push_back({key, false, describe()});
    }
    // The finding that ends the launch; it is never left out.
    void add_last(const std::string& line)
    {
        total_++;
        if (entries_.size() == KEPT) entries_.pop_back();
        entries_.push_back({0, false, line});
    }
    uint64_t total() const { return total_; }
    // One finding a line.
    std::string lines() const
    {
        std::string result;
        for (const Entry& entry : entries_) {
            result += entry.line;
            if (entry.again) result += " (and more like it)";
            result += '\n';
        }
        return result;
    }

private:
    static constexpr size_t KEPT = 8;
    struct Entry {
        uint64_t key;
        bool again;
        std::string line;
    };
    std::vector<Entry> entries_;
    uint64_t total_ = 0;
};
